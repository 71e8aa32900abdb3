"""Benchmarks whose answers are texts and programs, by the command's own way from configuration to results."""

import json

import pytest

from lowrank_kit.compare import main
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.evaluation.sandbox import check_sandbox
from lowrank_kit.pipeline import execute

PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": "def f(w1):\n",
    "canonical_solution": "    return w1",
    "test": "def check(f):\n    assert f(1) == 1",
    "entry_point": "f",
}


@pytest.fixture
def rows(tmp_path, texts_folder):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/text").symlink_to(texts_folder / "text")
    programs = [{**PROGRAM, "task_id": f"HumanEval/{n}"} for n in range(4)]
    (tmp_path / "rows/humaneval").mkdir()
    (tmp_path / "rows/humaneval/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in programs))
    return tmp_path / "rows"


@pytest.fixture
def job(language_arguments, composed, rows):
    def build(*more):
        few = ("task=code", "task.benchmarks.humaneval.max_new_tokens=4", "task.perplexity=false", *more)
        return composed(language_arguments(*few, method="none", data=rows))

    return build


def test_programs_are_refused_before_there_is_a_run(job, tmp_path):
    for stages in ("run.stages=[calibrate]", "run.stages=[evaluate]"):
        with pytest.raises(ConfigError, match=r"humaneval runs programs .* eval\.allow_code_execution=true"):
            execute(job(stages))
    assert not (tmp_path / "runs").exists()


def test_what_a_model_writes_is_run_and_two_runs_are_compared(job, monkeypatch, capsys, tmp_path):
    try:
        check_sandbox()
    except LowRankKitError as error:
        pytest.skip(str(error))
    run = execute(job("eval.allow_code_execution=true"))
    [record] = json.loads((run / "results.json").read_text())
    assert (record["task"], record["metric"], record["value"], record["n"]) == ("humaneval", "pass@1", 0.0, 4)
    samples = [json.loads(line) for line in (run / "samples/final/humaneval.jsonl").read_text().splitlines()]
    assert all(len(s["answers"]) == 1 and s["outcomes"][0]["status"] == "failed" for s in samples)

    right = {f"HumanEval/{n}" for n in range(3)}
    monkeypatch.setattr(
        BoundedLM,
        "generate_until",
        lambda self, requests: [PROGRAM["canonical_solution"] * (r.doc["task_id"] in right) for r in requests],
    )
    # The same model's answers are shared by runs of one cache.
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "other cache"))
    other = execute(
        job("eval.allow_code_execution=true", f"run.dir={tmp_path / 'other'}", "seed=1", "run.resume=false")
    )
    assert json.loads((other / "results.json").read_text())[0]["value"] == 0.75
    assert main([str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert "+0.7500" in out
    assert "0.25" in out
