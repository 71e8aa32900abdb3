"""What became of a sweep: `sweep.json`, and the table printed at its end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lowrank_kit.files import read_json
from lowrank_kit.runs.directory import run_path, write_atomically
from lowrank_kit.runs.status import read_status
from lowrank_kit.sweep.job import SweepFolder

COLUMNS = 4
"""Figures shown of a job; `sweep.json` has all."""


State = Literal["complete", "failed", "interrupted"]


@dataclass(frozen=True)
class JobReport:
    """One job: what it was, how it ended and what it found. Its own wall time, that of its last start, in seconds."""

    number: int
    overrides: tuple[str, ...]
    command: str
    run_dir: str
    state: State
    error: str | None
    seconds: float | None
    hostname: str | None
    restarts: int | None
    results: tuple[dict[str, Any], ...]

    def value(self, task: str, metric: str) -> float | None:
        """The final figure of a task."""
        return next((r["value"] for r in self.results if (r["task"], r["metric"]) == (task, metric)), None)


def report_job(
    folder: SweepFolder, number: int, overrides: Sequence[str], command: str, known: str | None
) -> JobReport:
    """Read how a job ended; ``known`` is what its launcher can say where the job itself left no word."""
    outcome = folder.outcome(number)
    path = Path(outcome.run_dir) if outcome else run_path(folder.config(number))
    state: State = "interrupted"
    if outcome:
        state, error = outcome.state, outcome.error
    else:
        status = read_status(path)
        stage = f" in stage {status.stage}" if status and status.stage else ""
        error = f"ended without a word{stage}" + (f": {known}" if known else "")
    results = path / "results.json"
    records = (read_json(results, list) or []) if state == "complete" else []
    return JobReport(
        number,
        tuple(overrides),
        command,
        str(path),
        state,
        error,
        outcome.seconds if outcome else None,
        outcome.hostname if outcome else None,
        outcome.restarts if outcome else None,
        tuple(_figure(record) for record in records if record["checkpoint"] == "final"),
    )


def _figure(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("task", "metric", "value", "stderr", "n")}


def write_report(folder: SweepFolder, jobs: Sequence[JobReport], seconds: float, launcher: Mapping[str, Any]) -> None:
    """Write `sweep.json`, which other programs may read."""
    done = sum(job.state == "complete" for job in jobs)
    whole = {
        "name": folder.path.name,
        "state": "complete" if done == len(jobs) else "failed",
        "complete": done,
        "seconds": seconds,
        "launcher": dict(launcher),
        "jobs": [asdict(job) for job in jobs],
    }
    write_atomically(folder.path / "sweep.json", json.dumps(whole, indent=2) + "\n")


def print_report(name: str, jobs: Sequence[JobReport]) -> None:
    """Print a line a job: what varies, how it ended, its first figures and its seconds."""
    console = Console(width=max(120, Console().width))
    lines = list(dict.fromkeys((r["task"], r["metric"]) for job in jobs for r in job.results))[:COLUMNS]
    table = Table(title=f"sweep {name}", title_justify="left")
    table.add_column("#", justify="right")
    for heading in ("overrides", "state"):
        table.add_column(heading, overflow="fold")
    for task, metric in lines:
        table.add_column(f"{task}\n{metric}", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("starts", justify="right")
    for job in jobs:
        figures = [_number(job.value(*line)) for line in lines]
        seconds = "-" if job.seconds is None else f"{job.seconds:.0f}"
        starts = "-" if job.restarts is None else str(job.restarts + 1)
        table.add_row(str(job.number), " ".join(job.overrides), job.state, *figures, seconds, starts)
    console.print(table, markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
