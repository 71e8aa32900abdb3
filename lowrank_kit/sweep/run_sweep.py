"""A sweep from its jobs to its report. What was done is not done again; one failed job hides no other."""

import hashlib
import logging
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lowrank_kit.compose import Job, Sweep
from lowrank_kit.config import RunConfig
from lowrank_kit.config.sweeps import Launcher
from lowrank_kit.console import set_up_log
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.runs.directory import run_path
from lowrank_kit.runs.status import read_status
from lowrank_kit.sweep.job import SweepFolder
from lowrank_kit.sweep.launch import launch
from lowrank_kit.sweep.report import JobReport, print_report, report_job, write_report

log = logging.getLogger(__name__)


def run_sweep(sweep: Sweep, flags: Sequence[str] = ()) -> Path:
    """Do every job, print the table, return the sweep's folder ROOT/sweeps/<jobs>-jobs-<hash>.

    Args:
        sweep: the jobs, checked.
        flags: what stands before the overrides in the command that makes one of the runs again.

    Raises:
        ConfigError: two jobs would work in one run directory.
        LowRankKitError: not every job is complete at the end.
    """
    paths = Counter(str(run_path(job.config)) for job in sweep.jobs)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise ConfigError(
            f"{paths[twice[0]]} jobs of this sweep are the same run, {twice[0]}: take out the values that are there "
            "twice, or run.dir"
        )
    digest = hashlib.sha256("\n".join(sorted(paths)).encode()).hexdigest()[:8]
    folder = Path(sweep.jobs[0].config.run.root) / "sweeps" / f"{len(sweep.jobs)}-jobs-{digest}"
    reports = run_jobs(sweep.jobs, folder, sweep.launcher, flags)
    print_report(folder.name, reports)
    if failed := [report for report in reports if report.state != "complete"]:
        lines = [f"  job {r.number} ({' '.join(r.overrides)}) {r.state}: {r.error}" for r in failed]
        heading = f"{len(failed)} of {len(reports)} jobs are not complete; the same command does only those again:"
        raise LowRankKitError("\n".join([heading, *lines]))
    return folder


def run_jobs(jobs: Sequence[Job], path: Path, launcher: Launcher, flags: Sequence[str] = ()) -> list[JobReport]:
    """Do jobs in the sweep folder ``path``, which a later call with more of them may continue; leave `sweep.json`."""
    set_up_log()
    folder, started = SweepFolder(path.resolve()), time.monotonic()
    for number, job in enumerate(jobs):
        folder.put(number, _grouped(job.config, path.name))
    todo = [number for number, job in enumerate(jobs) if not _is_done(folder, number, job.config)]
    if len(todo) < len(jobs):
        log.info("%d of %d jobs are complete already", len(jobs) - len(todo), len(jobs))
    known = launch(folder, todo, launcher) if todo else {}
    varying = _varying(jobs)
    words = ["python", "-m", "lowrank_kit.run", *flags]
    reports = [
        report_job(folder, number, varying[number], shlex.join([*words, *job.overrides]), known.get(number))
        for number, job in enumerate(jobs)
    ]
    write_report(folder, reports, time.monotonic() - started, launcher.model_dump())
    return reports


def _grouped(config: RunConfig, name: str) -> RunConfig:
    """With the sweep's name as the tracker's group, where none was chosen."""
    tracker = config.tracker.model_copy(update={"group": config.tracker.group or name})
    return config.model_copy(update={"tracker": tracker})


def _is_done(folder: SweepFolder, number: int, config: RunConfig) -> bool:
    outcome, status = folder.outcome(number), read_status(run_path(config))
    finished = outcome is not None and outcome.state == "complete" and status is not None
    return finished and config.run.resume and status is not None and status.state == "complete"


def _varying(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """Of each job, the overrides that not all have."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [tuple(o for o in job.overrides if o not in common) for job in jobs]
