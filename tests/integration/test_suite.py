import json

import pytest

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.harness import PreparedBenchmark
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.directory import write_atomically


@pytest.fixture
def job(language_arguments, composed, questions_folder):
    compressed = ("method.rank_multiple=1", "method.ratio=0.4")

    def build(*more, method="svd_llm"):
        words = ("task=smoke", "task.calibrate_on=null", *(compressed if method != "none" else ()), *more)
        return composed(language_arguments(*words, method=method, data=questions_folder))

    return build


def read(file):
    return json.loads(file.read_text())


def values(run, checkpoint="final"):
    return {(r["task"], r["metric"]): r["value"] for r in read(run / "results.json") if r["checkpoint"] == checkpoint}


def test_a_model_as_it_is_answers_the_benchmarks_that_there_are(job, capsys, caplog):
    run = execute(job(method="none"))
    found = {(r["task"], r["metric"]): r for r in read(run / "results.json")}
    assert list(found) == [("winogrande", "acc"), ("piqa", "acc"), ("piqa", "acc_norm"), ("average", "mean")]
    assert found["piqa", "acc"]["n"] == 9
    assert found["piqa", "acc"]["source"].startswith("local: piqa/validation.jsonl, validation, 9 rows")
    assert found["average", "mean"]["value"] == pytest.approx(
        (found["piqa", "acc"]["value"] + found["winogrande", "acc"]["value"]) / 2
    )
    samples = [json.loads(line) for line in (run / "samples/final/piqa.jsonl").read_text().splitlines()]
    assert sum(sample["acc"] for sample in samples) / 9 == pytest.approx(found["piqa", "acc"]["value"])
    assert "and not openbookqa" in caplog.text
    assert "final - dense" in capsys.readouterr().out
    assert set(read(run / "manifest.json")["data"]) >= {"piqa:validation", "winogrande:validation"}


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    """Call it, and answers of other runs are no longer found."""
    return lambda: monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "another cache"))


def test_a_compressed_model_stands_beside_the_dense_one_and_beside_perplexity(job, nothing_known):
    run = execute(job("task.perplexity=true", "task.window=32"))
    dense, final = values(run, "dense"), values(run)
    assert (
        set(dense)
        == set(final)
        == {
            *(("mine", "perplexity"), ("winogrande", "acc"), ("piqa", "acc"), ("piqa", "acc_norm"), ("average", "mean"))
        }
    )
    assert {path.name for path in (run / "samples/dense").iterdir()} == {"piqa.jsonl", "winogrande.jsonl"}
    nothing_known()
    alone = values(execute(job(method="none")))
    assert {line: dense[line] for line in alone} == alone
    again = execute(job(f"model.path={run / 'checkpoint'}", method="none"))
    assert values(again) == {line: final[line] for line in alone}


@pytest.fixture
def answered(monkeypatch):
    """Names of the benchmarks that a model is asked, as often as it is."""
    names, answer = [], PreparedBenchmark.answer

    def watched(self, lm):
        names.append(self.name)
        return answer(self, lm)

    monkeypatch.setattr(PreparedBenchmark, "answer", watched)
    return names


def test_the_dense_model_answers_once_for_all_runs(job, answered):
    first, second = execute(job()), execute(job("method.ratio=0.5"))
    as_it_came = execute(job(method="none"))
    assert sorted(answered) == sorted(["piqa", "winogrande"] * 3)
    assert values(first, "dense") == values(second, "dense") == values(as_it_came)


def test_damaged_answers_are_asked_again_and_say_so(job, answered, tmp_path, caplog):
    whole = values(execute(job(method="none")))
    [samples] = (tmp_path / "cache/benchmarks").glob("*/samples/dense/piqa.jsonl")
    samples.write_text(samples.read_text().replace('"acc": 1', '"acc": 0', 1))
    [figures] = (tmp_path / "cache/benchmarks").glob("*/benchmarks/dense/winogrande.json")
    figures.write_text(figures.read_text()[:-9])
    answered.clear()
    assert values(execute(job("run.resume=false", method="none"))) == whole
    assert sorted(answered) == ["piqa", "winogrande"]
    assert all(f"{name} is asked again" in caplog.text for name in answered)


def test_without_a_cache_nothing_of_a_run_is_kept_for_others(job, tmp_path):
    execute(job("calibration.cache=false", "task.perplexity=true", "task.window=32", "task.calibrate_on=mine"))
    assert not list((tmp_path / "cache").rglob("*.json*"))


def test_all_models_of_a_run_share_the_tokens_of_the_questions(job, monkeypatch):
    texts, encode = [], BoundedLM.tok_encode

    def watched(self, text, *rest, **more):
        texts.append(text)
        return encode(self, text, *rest, **more)

    monkeypatch.setattr(BoundedLM, "tok_encode", watched)
    execute(job())
    # Once for two models; of a question and its answer, the whole and the question.
    questions = 2 * (9 + 8)
    assert len(texts) == 2 * questions


def test_a_killed_run_goes_on_behind_the_last_benchmark_on_disk(job, answered, monkeypatch, nothing_known):
    whole, ask = values(execute(job(method="none"))), BoundedLM.loglikelihood
    nothing_known()

    def dies(self, requests, **more):
        if requests[0].task_name == "piqa":
            raise KeyboardInterrupt
        return ask(self, requests, **more)

    monkeypatch.setattr(BoundedLM, "loglikelihood", dies)
    with pytest.raises(KeyboardInterrupt):
        execute(job("run.resume=false", method="none"))
    monkeypatch.setattr(BoundedLM, "loglikelihood", ask)
    answered.clear()
    assert values(execute(job(method="none"))) == whole
    assert answered == ["piqa"]


def test_what_was_killed_between_samples_and_figures_is_asked_again(job, answered, monkeypatch, nothing_known):
    whole = values(execute(job(method="none")))
    nothing_known()

    def dies(path, text):
        if path.name == "piqa.json":
            raise KeyboardInterrupt
        write_atomically(path, text)

    monkeypatch.setattr("lowrank_kit.stages.suite.write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        execute(job("run.resume=false", method="none"))
    monkeypatch.setattr("lowrank_kit.stages.suite.write_atomically", write_atomically)
    answered.clear()
    run = execute(job(method="none"))
    assert answered == ["piqa"]
    assert values(run) == whole


@pytest.mark.parametrize("left", [0, 40])
def test_a_file_that_lost_its_end_counts_as_absent(left, job, answered, nothing_known):
    run = execute(job(method="none"))
    whole, file = values(run), run / "benchmarks/final/piqa.json"
    nothing_known()
    file.write_text(file.read_text()[:left])
    (run / "status.json").unlink()
    answered.clear()
    assert values(execute(job(method="none"))) == whole
    assert answered == ["piqa"]


def test_a_model_whose_context_is_too_short_is_told_what_to_do(job):
    with pytest.raises(
        LowRankKitError, match=r"18 of 18 prompts of piqa are longer than the 2 tokens .*~task\.benchmarks"
    ):
        execute(job("model.max_length=2", "~task.benchmarks.winogrande", method="none"))


def test_figures_of_other_weights_are_not_taken_for_ones_own(job, answered, tmp_path, checkpoint, tiny_model):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    for file in checkpoint("llama").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    again = ("run.stages=[evaluate]", f"model.path={folder}", f"run.dir={tmp_path / 'run'}")
    run = execute(job(*again, method="none"))
    tiny_model("llama", seed=1).save_pretrained(folder)
    (run / "status.json").unlink()
    with pytest.raises(LowRankKitError, match=r"model\.safetensors"):
        execute(job(*again, method="none"))
    assert answered == ["winogrande", "piqa"]
    execute(job(*again, "run.resume=false", method="none"))
    assert answered == ["winogrande", "piqa"] * 2


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["task.benchmarks.piqa.task=piqua"], ConfigError, "has no task 'piqua'; did you mean 'piqa'"),
        (["task.benchmarks.piqa.metrics=[accc]"], ConfigError, "did you mean 'acc'"),
        (["task.benchmarks.piqa.dataset=winogrande"], LowRankKitError, "columns sentence, option1"),
        (["eval.held_out=4"], ConfigError, "benchmarks are evaluated on splits of their own"),
        (["task=benchmark/pika"], ConfigError, "did you mean 'benchmark/piqa'"),
        (["~task.benchmarks"], ConfigError, "there is nothing to evaluate on"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(words, error, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(error, match=message):
        execute(job(*words))


def test_a_benchmark_named_alone_has_no_text_to_calibrate_on(job):
    with pytest.raises(ConfigError, match=r"no text to calibrate on.*task\.texts"):
        execute(job("~task.texts"))
