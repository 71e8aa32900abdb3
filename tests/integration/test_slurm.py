"""Sweeps in a real queue: one-node SLURM on the loopback, started and stopped here."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.runs.directory import Status, read_status, run_path
from lowrank_kit.sweep.job import SweepFolder

CLUSTER = Path(__file__).resolve().parents[1] / "slurm_cluster.sh"
MISSING = [program for program in ("slurmctld", "slurmd", "munged") if not shutil.which(program, path="/usr/sbin")]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here ({', '.join(MISSING)}): apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a test cluster can only be started by root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "up", folder], check=True, timeout=60)
    yield folder / "slurm.conf"
    subprocess.run([CLUSTER, "down", folder], check=True, timeout=60)


@pytest.fixture
def environment(environment, cluster) -> dict[str, str]:
    return {**environment, "SLURM_CONF": str(cluster), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen in {seconds} s")


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None


def test_a_sweep_with_a_requeued_a_failing_and_a_cancelled_job(command, environment, tmp_path, wandb_records):
    words = ["method=lora", "train.max_steps=300", "train.eval_every=100", "train.save_every=10"]
    queued = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=1"]
    rates = "train.learning_rate=1e-3,1e30,2e-3,3e-3"
    sweep = [*command(*words), "-m", *queued, rates, "tracker=wandb", "tracker.mode=offline"]
    process = subprocess.Popen(sweep, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def slurm(*arguments: str) -> str:
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout

    [folder] = wait_for(lambda: list(tmp_path.glob("runs/sweeps/4-jobs-*")), "the sweep's folder")
    ids = wait_for(lambda: read(folder / "queued.json"), "the submission")
    slurm("scancel", ids["3"])

    first = run_path(SweepFolder(folder).config(0))
    wait_for(lambda: list(first.glob("checkpoints/checkpoint-*")), "training")
    slurm("scontrol", "requeue", ids["0"])
    # SLURM holds back what was requeued for two minutes.
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", ids["0"]), "requeueing")
    slurm("scontrol", "update", f"JobId={ids['0']}", "StartTime=now")

    output, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert "2 of 4 jobs are not complete" in errors
    assert "job 1 (train.learning_rate=1e+30) failed: training lost its way" in errors
    assert "Traceback" not in errors
    assert "sweep 4-jobs-" in output
    report = read(folder / "sweep.json")
    jobs = report["jobs"]
    assert [job["state"] for job in jobs] == ["complete", "failed", "complete", "interrupted"]
    # Without accounting, an element that was cancelled before it was started leaves no trace.
    assert re.search(r"the queue says (CANCELLED|nothing) of job", jobs[3]["error"])
    assert (jobs[0]["restarts"], jobs[2]["restarts"]) == (1, 0)
    assert "JobState=FAILED" in slurm("scontrol", "show", "job", ids["1"])
    assert read(Path(jobs[1]["run_dir"]) / "status.json")["state"] == "failed"
    exits = {Path(job["run_dir"]).name: wandb_records(Path(job["run_dir"])) for job in jobs[:3]}
    assert [runs[-1]["exit_code"] for runs in exits.values()] == [0, 1, 0]
    # The killed start may not have written who it is.
    assert {run["group"] for runs in exits.values() for run in runs if run["id"]} == {folder.name}

    alone = subprocess.run(
        command(*words, "train.learning_rate=1e-3", f"run.root={tmp_path / 'alone'}"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    [undisturbed] = (file.parent for file in tmp_path.glob("alone/*/results.json"))
    assert read(undisturbed / "results.json") == read(first / "results.json")
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (undisturbed, first)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_job_that_is_warned_goes_back_to_the_queue_and_two_share_an_element(command, environment, tmp_path):
    words = ["method=lora", "train.max_steps=300", "train.eval_every=100", "train.save_every=10", "seed=0,1"]
    queued = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=1"]
    sweep = [*command(*words), "-m", *queued, "hydra.launcher.tasks_per_node=2"]
    process = subprocess.Popen(sweep, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def slurm(*arguments: str) -> str:
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout

    [folder] = wait_for(lambda: list(tmp_path.glob("runs/sweeps/2-jobs-*")), "the sweep's folder")
    [job_id] = set(wait_for(lambda: read(folder / "queued.json"), "the submission").values())
    first = run_path(SweepFolder(folder).config(0))
    wait_for(lambda: list(first.glob("checkpoints/checkpoint-*")), "training")
    # As SLURM sends before the time limit, and before it takes the node for somebody else.
    slurm("scancel", "--signal=USR2", job_id)
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job_id), "requeueing")
    assert (read_status(first) or Status("failed")).state == "interrupted"
    slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == f"sweep: {folder}"
    assert [job["state"] for job in read(folder / "sweep.json")["jobs"]] == ["complete", "complete"]
    assert read(folder / "sweep.json")["jobs"][0]["restarts"] == 1
    # Its calibration was done before the warning, and is not done again.
    assert (first / "log.txt").read_text().count("glue/rte: calibrate") == 1
