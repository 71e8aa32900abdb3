"""Sweeps in a real queue: one-node SLURM on the loopback, started and stopped here."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.runs.directory import run_path
from lowrank_kit.sweep.job import SweepFolder

CLUSTER = Path(__file__).resolve().parents[1] / "slurm_cluster.sh"
MISSING = [program for program in ("slurmctld", "slurmd", "munged") if not shutil.which(program, path="/usr/sbin")]

PATIENT = """
import os, time
from torch.optim.optimizer import register_optimizer_step_post_hook
from lowrank_kit.adapters.lora import Lora

class PatientLora(Lora):
    pass

if os.environ.get("SLURM_JOB_ID") and "SLURM_RESTART_COUNT" not in os.environ:
    register_optimizer_step_post_hook(lambda *_: time.sleep(0.5))
"""
"""LoRA whose first start in the queue takes at least half a second a step, on whatever machine."""

SECOND_CHECKPOINT = "checkpoints/checkpoint-[2-9]*/trainer_state.json"
"""With save_every=10; its state is the last of its files, so that one whole checkpoint is there."""

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


@pytest.fixture
def slurm(environment) -> Callable[..., str]:
    """A command of SLURM's: what it prints."""

    def call(*words: str) -> str:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    return call


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen in {seconds} s")


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None


def test_a_sweep_with_a_requeued_a_failing_and_a_cancelled_job(command, environment, slurm, tmp_path, wandb_records):
    words = ["method=lora", "train.max_steps=300", "train.eval_every=100", "train.save_every=10"]
    queued = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=1"]
    rates = "train.learning_rate=1e-3,1e30,2e-3,3e-3"
    sweep = [sys.executable, *command(*words), "-m", *queued, rates, "tracker=wandb", "tracker.mode=offline"]
    process = subprocess.Popen(sweep, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    [folder] = wait_for(lambda: list(tmp_path.glob("runs/sweeps/4-jobs-*")), "the sweep's folder")
    ids = wait_for(lambda: read(folder / "queued.json"), "the submission")
    slurm("scancel", ids["3"])

    first = run_path(SweepFolder(folder).config(0))
    wait_for(lambda: list(first.glob(SECOND_CHECKPOINT)), "training")
    slurm("scontrol", "requeue", ids["0"])
    # SLURM holds back what was requeued for two minutes.
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", ids["0"]), "requeueing")
    # By its own word: work that went on past SIGTERM could end well after its tracker had died.
    wait_for(lambda: read(first / "status.json")["state"] == "interrupted", "the end of the first start")
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
    assert "training goes on from step" in (first / "log.txt").read_text()
    assert "JobState=FAILED" in slurm("scontrol", "show", "job", ids["1"])
    assert read(Path(jobs[1]["run_dir"]) / "status.json")["state"] == "failed"
    exits = {Path(job["run_dir"]).name: wandb_records(Path(job["run_dir"])) for job in jobs[:3]}
    assert [runs[-1]["exit_code"] for runs in exits.values()] == [0, 1, 0]
    # The killed start may not have written who it is.
    assert {run["group"] for runs in exits.values() for run in runs if run["id"]} == {folder.name}

    alone = subprocess.run(
        [sys.executable, *command(*words, "train.learning_rate=1e-3", f"run.root={tmp_path / 'alone'}")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    [undisturbed] = (file.parent for file in tmp_path.glob("alone/*/results.json"))
    assert read(undisturbed / "results.json") == read(first / "results.json")
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (undisturbed, first)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_job_that_is_warned_goes_back_to_the_queue_and_two_share_an_element(command, environment, slurm, tmp_path):
    words = ["method=lora", "train.max_steps=300", "train.eval_every=100", "train.save_every=10", "seed=0,1"]
    queued = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=1"]
    sweep = [sys.executable, *command(*words), "-m", *queued, "hydra.launcher.tasks_per_node=2"]
    process = subprocess.Popen(sweep, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    [folder] = wait_for(lambda: list(tmp_path.glob("runs/sweeps/2-jobs-*")), "the sweep's folder")
    [job_id] = set(wait_for(lambda: read(folder / "queued.json"), "the submission").values())
    first = run_path(SweepFolder(folder).config(0))
    wait_for(lambda: list(first.glob(SECOND_CHECKPOINT)), "training")
    # As SLURM sends before the time limit, and before it takes the node for somebody else.
    slurm("scancel", "--signal=USR2", job_id)
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job_id), "requeueing")
    wait_for(lambda: read(first / "status.json")["state"] == "interrupted", "the end of the first start")
    slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == f"sweep: {folder}"
    assert [job["state"] for job in read(folder / "sweep.json")["jobs"]] == ["complete", "complete"]
    assert read(folder / "sweep.json")["jobs"][0]["restarts"] == 1
    assert "training goes on from step" in (first / "log.txt").read_text()
    # Its calibration was done before the warning, and is not done again.
    assert (first / "log.txt").read_text().count("glue/rte: calibrate") == 1


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_job_that_reaches_its_time_limit_is_requeued_and_goes_on_by_itself(command, environment, tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    environment = {**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"}
    patient = ["method._target_=patient.PatientLora", "run.method_prefixes=[patient]"]
    words = ["method=lora", *patient, "train.max_steps=300", "train.save_every=5"]
    # SLURM looks every half a minute: the warning comes 30 to 60 s before the limit.
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30", "train.eval_every=100"]
    queued = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=1", *limit]
    sweep = [sys.executable, *command(*words), "-m", *queued, "train.learning_rate=1e-3"]
    done = subprocess.run(sweep, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    [folder] = tmp_path.glob("runs/sweeps/1-jobs-*")
    [job] = read(folder / "sweep.json")["jobs"]
    assert job["state"] == "complete"
    assert job["restarts"] >= 1
    [log] = folder.glob("queue/*/*_log.err")
    assert log.read_text().count("this job is timed-out") == job["restarts"]
    history = (Path(job["run_dir"]) / "log.txt").read_text()
    assert history.count("training goes on from step") == job["restarts"]
    assert history.count("glue/rte: calibrate") == 1
