"""LongBench's tasks on rows of one's own: how long a prompt gets, and what is counted."""

import pytest

from lowrank_kit.data.benchmarks import load_benchmarks
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.harness import PreparedBenchmark
from lowrank_kit.evaluation.language_model import BoundedLM

pytestmark = pytest.mark.assets
CONTEXT = " ".join(f"Passage {n}: the {n * n}th door of the house is green." for n in range(60))
ROW = {
    "question": "Which door is green?",
    "context": CONTEXT,
    "answers": ["the 25th door", "door 25"],
    "all_classes": None,
}
ROOM = 32


@pytest.fixture
def prepared(local, benchmark):
    def build(task, rows, **changes):
        name = f"longbench_{task}"
        source = local(f"longbench/{task}", "test", rows)
        return PreparedBenchmark(load_benchmarks({name: benchmark(name, "longbench", **changes)}, source)[name])

    return build


@pytest.fixture
def read(monkeypatch):
    """The token ids of every prompt that a model is given to go on from."""
    prompts, generate = [], BoundedLM._model_generate

    def watched(self, context, *rest, **more):
        prompts.extend(context.tolist())
        return generate(self, context, *rest, **more)

    monkeypatch.setattr(BoundedLM, "_model_generate", watched)
    return prompts


ORDER = "Answer the question based on the given passages. Only give me the answer and do not output any other words."


def prompt_of(row):
    given = f"{ORDER}\n\nThe following are given passages.\n{row['context']}\n\n"
    return f"{given}{ORDER}\n\nQuestion: {row['question']}\nAnswer:"


@pytest.mark.parametrize("most", [256, 400])
def test_a_long_prompt_loses_its_middle_and_a_short_one_nothing(most, prepared, model, tokenizer, read):
    short = {**ROW, "context": "Passage 1: the door is green."}
    found = prepared("hotpotqa", [ROW, short]).answer(BoundedLM(model, tokenizer, 1, most))
    whole = tokenizer(prompt_of(ROW))["input_ids"]
    half = (most - ROOM) // 2
    # LongBench's pred.py.
    expected = tokenizer.decode(whole[:half], skip_special_tokens=True)
    expected += tokenizer.decode(whole[-half:], skip_special_tokens=True)
    by_length = sorted((tokenizer.decode(ids, skip_special_tokens=True) for ids in read), key=len)
    assert by_length == [prompt_of(short), expected]
    assert len(whole) > 2 * most
    assert len(found.samples) == 2


def test_the_same_prompt_is_an_error_where_nothing_may_be_cut(prepared, model, tokenizer):
    with pytest.raises(LowRankKitError, match=r"1 of 1 prompts of longbench_hotpotqa .*longer than the 256 tokens"):
        prepared("hotpotqa", [ROW], cut_middle=False).answer(BoundedLM(model, tokenizer, 1, 256))


def test_no_prompt_is_left_where_the_answer_takes_all_that_a_model_reads(prepared, model, tokenizer):
    with pytest.raises(LowRankKitError, match=r"with the 32 to be generated"):
        prepared("hotpotqa", [ROW]).answer(BoundedLM(model, tokenizer, 1, ROOM))


@pytest.mark.parametrize(
    ("task", "row", "said", "score"),
    [
        ("hotpotqa", {"answers": ["no", "the 25th door"]}, "25th door!", 1.0),
        # One of two words is right, and all of one word that was wanted.
        ("qasper", {"answers": ["green"]}, "green house", 2 / 3),
        ("trec", {"answers": ["Food"], "all_classes": ["Food", "Animal"]}, "Food", 1.0),
        ("trec", {"answers": ["Food"], "all_classes": ["Food", "Animal"]}, "Animal", 0.0),
        ("passage_count", {"answers": ["7"]}, "7 or 8", 0.5),
        ("passage_retrieval_en", {"answers": ["Paragraph 12"]}, "Paragraph 12", 1.0),
        ("lcc", {"answers": ["return value"]}, "# so\nreturn value\nx = 1", 1.0),
        ("gov_report", {"answers": ["doors are green here"]}, "doors are green here", 1.0),
        ("gov_report", {"answers": ["doors are green here"]}, "nothing", 0.0),
    ],
)
def test_each_kind_of_task_counts_as_longbench_does(task, row, said, score, prepared, model, tokenizer, monkeypatch):
    monkeypatch.setattr(BoundedLM, "generate_until", lambda self, requests: [said] * len(requests))
    found = prepared(task, [{**ROW, **row}]).answer(BoundedLM(model, tokenizer, 1, 512))
    assert found.figures == {"score": (pytest.approx(score), None)}
