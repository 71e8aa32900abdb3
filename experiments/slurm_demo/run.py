"""Twelve jobs on a real one-node SLURM: one killed in the middle and requeued, one that fails, all tracked offline.

    python experiments/slurm_demo/run.py [--work FOLDER]

Needs root, Debian's slurm-wlm and munge, and `python -m lowrank_kit.assets minilm_l6 benchmark_rows`. Starts the
cluster on the loopback and stops it at the end. Writes results.json and table.md beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_kit.runs.offline import offline_runs
from lowrank_kit.runs.provenance import parse_study

HERE = Path(__file__).resolve().parent
CLUSTER = HERE.parents[1] / "tests" / "slurm_cluster.sh"
# Eleven learning rates and a hopeless one, chosen between on held-out training rows.
RATES = [*(f"{rate}e-4" for rate in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70)), "1e30"]
KILLED, FAILING = 2, 11
RUN = [
    *("method=astra", "model=minilm_l6", "task=glue/sst2", "device=cpu", "eval.held_out=200"),
    *(
        "train.max_steps=40",
        "train.batch_size=16",
        "train.eval_every=20",
        "train.save_every=20",
        "calibration.samples=32",
    ),
]
TRACKED = ["tracker=wandb", "tracker.mode=offline", "tracker.project=slurm_demo"]
QUEUE = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=2"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "slurm_demo")
    arguments = parse_study(parser)
    work = arguments.work
    subprocess.run([CLUSTER, "up", work / "cluster"], check=True)
    os.environ |= {"SLURM_CONF": str(work / "cluster" / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    # A cache of its own, so that calibration happens here: once, whatever ran before.
    os.environ["LOWRANK_KIT_CACHE"] = str(cache(work))
    try:
        found = demonstrate(work)
    finally:
        subprocess.run([CLUSTER, "down", work / "cluster"], check=True)
    (HERE / "results.json").write_text(
        json.dumps({"provenance": arguments.provenance, **found}, indent=1).replace(str(work), "WORK") + "\n"
    )
    (HERE / "table.md").write_text(table(found))
    print(table(found))


def cache(work: Path) -> Path:
    from lowrank_kit.assets import cache_dir

    folder = work / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "assets").exists():
        (folder / "assets").symlink_to(cache_dir() / "assets")
    return folder


def demonstrate(work: Path) -> dict[str, Any]:
    started = time.monotonic()
    rates = f"train.learning_rate={','.join(RATES)}"
    words = [sys.executable, "-m", "lowrank_kit.run", "-m", *QUEUE, *RUN, *TRACKED, rates, f"run.root={work / 'runs'}"]
    with (work / "sweep.log").open("w") as output:
        sweep = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        [folder] = wait_for(lambda: list((work / "runs").glob("sweeps/*")))
        job_id = wait_for(lambda: read(folder / "queued.json"))[str(KILLED)]
        run_dir = wait_for(lambda: run_of(work / "runs", RATES[KILLED]))
        wait_for(lambda: (run_dir / "checkpoints").is_dir() and list((run_dir / "checkpoints").glob("checkpoint-*")))
        slurm("scontrol", "requeue", job_id)
        # SLURM holds a requeued job back for two minutes; the demonstration does not wait for that.
        wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job_id))
        slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now")
        status = sweep.wait()
    seconds = time.monotonic() - started
    report = read(folder / "sweep.json")
    failing = slurm("scontrol", "show", "job", f"{job_id.partition('_')[0]}_{FAILING}")
    alone = work / "alone"
    again = [sys.executable, "-m", "lowrank_kit.run", *RUN, f"train.learning_rate={RATES[KILLED]}", f"run.root={alone}"]
    subprocess.run(again, check=True)
    never_killed = next(alone.glob("astra-*/results.json")).parent
    logs = [file.read_text() for file in (work / "runs").glob("astra-*/log.txt")]
    return {
        "command": " ".join(["python", *words[1:]]),
        "exit_status": status,
        "wall_seconds": round(seconds, 1),
        "sum_of_job_seconds": round(sum(job["seconds"] for job in report["jobs"]), 1),
        "failing_job_in_slurm": "FAILED" if "JobState=FAILED" in failing else failing,
        "failing_job_in_status_json": read(Path(report["jobs"][FAILING]["run_dir"]) / "status.json")["state"],
        "killed_and_never_killed": {
            "results_equal": values(run_dir) == values(never_killed),
            "adapters_equal_to_the_bit": adapter(run_dir) == adapter(never_killed),
            "starts": report["jobs"][KILLED]["restarts"] + 1,
            "killed": values(run_dir),
            "never_killed": values(never_killed),
        },
        "calibrations_on_disk": len(list((work / "cache" / "calibration").glob("*/key.json"))),
        "jobs_that_waited_for_a_calibration": sum("waiting for the calibration" in text for text in logs),
        "wandb": [tracked(job) for job in report["jobs"]],
        "jobs": report["jobs"],
    }


def run_of(root: Path, rate: str) -> Path | None:
    for file in root.glob("astra-*/config.yaml"):
        if f"learning_rate: {float(rate)!r}\n" in file.read_text().replace("head_learning_rate", "head"):
            return file.parent
    return None


def tracked(job: dict[str, Any]) -> dict[str, Any]:
    runs = offline_runs(Path(job["run_dir"]))
    return {
        "job": job["number"],
        "ids": sorted({run["id"] for run in runs if run["id"]}),
        "groups": sorted({run["group"] for run in runs if run["id"]}),
        "starts": len(runs),
        "exit_codes": [run["exit_code"] for run in runs],
        "learning_rate": runs[-1]["config"]["train"]["learning_rate"],
        "rows_of_history": sum(len(run["history"]) for run in runs),
        "summary": {key: value for key, value in runs[-1]["summary"].items() if key.startswith("glue/")},
    }


def values(run_dir: Path) -> list[Any]:
    return [[r["checkpoint"], r["metric"], r["value"]] for r in read(run_dir / "results.json")]


def adapter(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None


def wait_for(condition: Callable[[], Any], seconds: float = 900) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"nothing in {seconds} s")


def table(found: dict[str, Any]) -> str:
    lines = ["| job | learning rate | state | held-out accuracy | starts | seconds | W&B exit |", "|" + "---|" * 7]
    for job, run in zip(found["jobs"], found["wandb"], strict=True):
        accuracy = next((f"{100 * r['value']:.1f}" for r in job["results"]), "-")
        exits = ", ".join("none" if code is None else str(code) for code in run["exit_codes"])
        cells = (
            job["number"],
            RATES[job["number"]],
            job["state"],
            accuracy,
            job["restarts"] + 1,
            f"{job['seconds']:.0f}",
        )
        lines.append("| " + " | ".join(map(str, (*cells, exits))) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
