"""Sweeps and searches on this machine, with real runs of a tiny model."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import warm

from lowrank_kit import run


@pytest.fixture
def main(language_arguments, capsys):
    """The command in this process: exit status and what it printed."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            run.main(language_arguments("calibration.samples=2", *words, method="svd"))
        except SystemExit as left:
            return int(left.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_sweep_is_summed_up_and_does_nothing_twice(main, tmp_path):
    sweep = ("-m", "method.ratio=0.3,0.4")
    status, output, errors = main(*sweep)
    assert status == 0, errors
    [folder] = tmp_path.glob("runs/sweeps/2-jobs-*")
    assert output.splitlines()[-1] == f"sweep: {folder}"
    report = read(folder / "sweep.json")
    assert (report["state"], report["complete"]) == ("complete", 2)
    for job, ratio in zip(report["jobs"], (0.3, 0.4), strict=True):
        assert job["overrides"] == [f"method.ratio={ratio}"]
        final = [r for r in read(Path(job["run_dir"]) / "results.json") if r["checkpoint"] == "final"]
        assert [r["value"] for r in job["results"]] == [r["value"] for r in final]
        assert f"{job['results'][0]['value']:.4g}" in output

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/status.json")}
    assert main(*sweep)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert read(folder / "sweep.json")["jobs"] == report["jobs"]


def test_two_jobs_that_are_one_run_are_refused(main, tmp_path):
    status, _, errors = main("-m", "method.ratio=0.3,0.30")
    assert (status, "2 jobs of this sweep are the same run" in errors) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def signalled(language_arguments, environment, tmp_path):
    """A sweep in processes of its own, one of which gets a signal as it begins: exit status and errors."""

    def sweep(launcher: str, sign: signal.Signals) -> tuple[int, str]:
        words = ["-m", f"hydra/launcher={launcher}", "method.ratio=0.3,0.4", "calibration.samples=2"]
        process = warm.Command(["-m", "lowrank_kit.run", *language_arguments(*words, method="svd")], environment)
        deadline = time.monotonic() + 240
        found = None
        while found is None and time.monotonic() < deadline:
            for file in tmp_path.glob("runs/svd-*/config.yaml"):
                if "ratio: 0.4" in file.read_text() and (file.parent / "status.json").is_file():
                    found = file.parent
            time.sleep(0.002)
        assert found is not None
        os.kill(read(found / "status.json")["pid"], sign)
        return process.wait(), process.stderr

    return sweep


def test_side_by_side_a_killed_job_takes_no_other_along(signalled, tmp_path):
    status, errors = signalled("joblib", signal.SIGKILL)
    assert status == 1
    assert re.search(r"job 1 \(method.ratio=0.4\) interrupted: .* exit status -9", errors)
    [folder] = tmp_path.glob("runs/sweeps/*")
    assert [job["state"] for job in read(folder / "sweep.json")["jobs"]] == ["complete", "interrupted"]


def test_submitits_own_processes_put_a_job_back_that_was_warned_of_its_time_limit(signalled, tmp_path):
    status, errors = signalled("submitit_local", signal.SIGUSR2)
    assert status == 0, errors
    [folder] = tmp_path.glob("runs/sweeps/*")
    jobs = read(folder / "sweep.json")["jobs"]
    assert [job["state"] for job in jobs] == ["complete", "complete"]
    logs = "".join(file.read_text() for file in folder.glob("queue/*/*_log.out"))
    # Warned long before the limit: a preemption, which counts as none of max_num_timeout.
    assert re.findall(r"Requeued job .* \((\d+) remaining timeouts\)", logs) == ["20"]


def test_a_job_of_submitits_that_is_told_to_end_does_not_work_on(signalled, tmp_path):
    status, errors = signalled("submitit_local", signal.SIGTERM)
    assert status == 1
    assert "job 1 (method.ratio=0.4) interrupted" in errors
    [folder] = tmp_path.glob("runs/sweeps/*")
    first, second = read(folder / "sweep.json")["jobs"]
    assert (first["state"], second["state"]) == ("complete", "interrupted")
    assert not (Path(second["run_dir"]) / "results.json").exists()


def test_a_search_continues_where_it_stopped(main, tmp_path):
    space = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.study=ratio", "method.ratio=interval(0.3,0.5)")
    chosen_on = "eval.held_out=2"
    status, output, errors = main(*space, "hydra.sweeper.trials=2", chosen_on)
    assert status == 0, errors
    folder = tmp_path / "runs" / "searches" / "ratio"
    assert output.splitlines()[-1] == f"search: {folder}"
    study = optuna.load_study(study_name="ratio", storage=f"sqlite:///{folder / 'study.db'}")
    # As a killed process leaves it: proposed, and never answered.
    left = study.ask({"++method.ratio": optuna.distributions.FloatDistribution(0.3, 0.5)})

    status, output, errors = main(*space, "hydra.sweeper.trials=3", chosen_on)
    assert status == 0, errors
    answered = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
    assert [t.number for t in answered] == [0, 1, 3]
    assert answered[-1].params == left.params
    trials = read(folder / "search.json")["trials"]
    assert [t["value"] for t in trials] == sorted(t.value for t in answered)
    for trial in trials:
        [record] = [r for r in read(Path(trial["run_dir"]) / "results.json") if r["checkpoint"] == "final"]
        assert trial["value"] == record["value"]
    assert f"best: {trials[0]['command']}" in output

    status, _, errors = main(*space[:-1], "method.ratio=interval(0.3,0.7)", chosen_on)
    assert (status, "was begun as another search" in errors) == (2, True)


def test_a_search_on_an_evaluation_split_is_refused(main, tmp_path):
    status, _, errors = main("-m", "hydra/sweeper=optuna", "hydra.sweeper.study=ratio", "method.ratio=0.3,0.4")
    assert (status, "add eval.held_out=N" in errors) == (2, True)
    assert not (tmp_path / "runs").exists()
