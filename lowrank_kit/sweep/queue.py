"""Jobs in a queue, by submitit: handed over as one array, put back when they are cut short, watched until they end.

Whether a job has ended is told by its own outcome file, and only for want of one by the queue: without accounting
submitit takes a cancelled job for one that still waits.
"""

import json
import logging
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_kit.config.sweeps import Submitit
from lowrank_kit.console import set_up_console, unwind_on_sigterm
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.lock import SILENCE_SECONDS
from lowrank_kit.runs.directory import run_path, write_atomically
from lowrank_kit.runs.status import read_status
from lowrank_kit.sweep.job import SweepFolder

log = logging.getLogger(__name__)

ACTIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
)
"""States in which squeue lists a job that may still run."""
LOOKS = 3
"""How often a job must be found gone and without an outcome: files on a network file system arrive late."""


class Work:
    """What the queue runs: as many configurations as the element has processes, one each."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder

    def __call__(self, numbers: Sequence[int]) -> None:
        """Do the job of this process; an exception makes the element fail in the queue, too."""
        import submitit

        set_up_console()
        # submitit lets it pass, and the job would work on without its tracker, whose process SIGTERM ends.
        unwind_on_sigterm()
        rank = submitit.JobEnvironment().global_rank
        try:
            if rank < len(numbers):
                self._folder.run(numbers[rank])
        except Exception:
            self._wait_for_others(rank, numbers)
            raise
        self._wait_for_others(rank, numbers)

    def checkpoint(self, numbers: Sequence[int]) -> Any:
        """What to put back to the queue before the time limit or a preemption: the same; a run finds its own work."""
        from submitit.helpers import DelayedSubmission

        # Requeueing brings SIGTERM, and this process is on its way out by then.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(self, numbers)

    def _wait_for_others(self, rank: int, numbers: Sequence[int]) -> None:
        """Stay, if this is the first process of its element: only that one puts it back to the queue."""
        if rank > 0:
            return
        deadline = time.monotonic() + SILENCE_SECONDS

        def at_work(number: int) -> bool:
            if self._folder.outcome(number):
                return False
            status = read_status(run_path(self._folder.config(number)))
            return time.monotonic() < deadline if status is None else status.state == "running"

        while any(at_work(number) for number in numbers[1:]):
            time.sleep(5)


def launch_queued(folder: SweepFolder, numbers: Sequence[int], settings: Submitit) -> dict[int, str]:
    """Hand jobs to the queue and wait; return by number what the queue says of those that left no outcome.

    Jobs that an earlier command handed over and that still wait or run are waited for, not handed over again.
    Raises `ConfigError` without submitit or SLURM.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("this launcher needs submitit: pip install 'lowrank_kit[slurm]'") from error
    if settings.cluster == "slurm" and not shutil.which("sbatch"):
        raise ConfigError("there is no sbatch here: run on a node that submits to SLURM, or use hydra/launcher=joblib")
    queue = Slurm() if settings.cluster == "slurm" else Local()
    size = settings.nodes * settings.tasks_per_node
    timeouts = {f"{settings.cluster}_max_num_timeout": settings.max_num_timeout}
    executor = submitit.AutoExecutor(folder.path / "queue" / "%j", cluster=settings.cluster, **timeouts)
    executor.update_parameters(**_parameters(settings, folder.path.name))
    waiting = _still_queued(folder, numbers) if settings.cluster == "slurm" else {}
    todo = [number for number in numbers if number not in waiting]
    for number in todo:
        folder.forget(number)
    elements = [todo[start : start + size] for start in range(0, len(todo), size)]
    if settings.cluster == "slurm" and elements:
        try:
            jobs = executor.map_array(Work(folder), elements)
        except submitit.core.utils.FailedJobError as error:
            raise LowRankKitError(f"SLURM did not take the jobs: {str(error).strip()}") from error
        for job, element in zip(jobs, elements, strict=True):
            waiting |= dict.fromkeys(element, job.job_id)
        elements = []
        _note(folder, waiting)
        log.info("%d jobs in the queue as %s; logs in %s", len(waiting), _bases(waiting), folder.path / "queue")
    fates: dict[int, str] = {}
    gone: Counter[int] = Counter()
    last: dict[str, str] = {}
    said = ""
    while waiting or elements:
        while elements and len(set(waiting.values())) < settings.array_parallelism:
            job = executor.submit(Work(folder), elements[0])
            queue.know(job)
            waiting |= dict.fromkeys(elements.pop(0), job.job_id)
        time.sleep(settings.poll_seconds)
        states = queue.states(set(waiting.values()))
        # What has ended is soon forgotten by the queue.
        last |= states or {}
        for number, job_id in list(waiting.items()):
            gone[number] = 0 if states is None or states.get(job_id) in ACTIVE else gone[number] + 1
            if folder.outcome(number) is not None:
                del waiting[number]
            elif gone[number] >= LOOKS:
                known = last.get(job_id, "nothing")
                fates[number] = f"the queue says {known} of job {job_id}; logs: {folder.path / 'queue' / job_id}"
                del waiting[number]
        said = _say(folder, numbers, waiting, states, said)
    return fates


class Slurm:
    """SLURM's queue, as squeue shows it; finished jobs are listed for a while."""

    def know(self, job: Any) -> None:
        """Nothing: the id is enough."""

    def states(self, job_ids: set[str]) -> dict[str, str] | None:
        """State by id; one that SLURM has forgotten is absent. None if SLURM does not answer."""
        words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={_bases_of(job_ids)}"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            return {} if "Invalid job id" in done.stderr else None
        return dict(line.strip().split("|") for line in done.stdout.splitlines() if "|" in line)


class Local:
    """submitit's processes on this machine."""

    def __init__(self) -> None:
        self._jobs: dict[str, Any] = {}

    def know(self, job: Any) -> None:
        """Remember a job that was submitted."""
        self._jobs[job.job_id] = job

    def states(self, job_ids: set[str]) -> dict[str, str] | None:
        """State by id."""
        return {job_id: self._jobs[job_id].state for job_id in job_ids}


def _still_queued(folder: SweepFolder, numbers: Sequence[int]) -> dict[int, str]:
    file = folder.path / "queued.json"
    if not file.is_file():
        return {}
    earlier = json.loads(file.read_text())
    states = Slurm().states(set(earlier.values())) or {}
    found = {int(n): job for n, job in earlier.items() if states.get(job) in ACTIVE and int(n) in numbers}
    if found:
        log.info("%d jobs are in the queue already, as %s", len(found), _bases(found))
    return found


def _note(folder: SweepFolder, waiting: Mapping[int, str]) -> None:
    write_atomically(folder.path / "queued.json", json.dumps({str(number): job for number, job in waiting.items()}))


def _parameters(settings: Submitit, name: str) -> dict[str, Any]:
    shared = ("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb")
    own = ("cluster", "poll_seconds", "max_num_timeout", *shared)
    chosen = {key: value for key, value in settings.model_dump().items() if value is not None}
    parameters = {key: chosen[key] for key in shared if key in chosen}
    if settings.cluster == "slurm":
        parameters |= {f"slurm_{key}": value for key, value in chosen.items() if key not in own}
        parameters["slurm_setup"] = list(settings.setup)
        parameters["name"] = name
    else:
        parameters["local_setup"] = list(settings.setup)
    return parameters


def _bases(waiting: Mapping[int, str]) -> str:
    return _bases_of(set(waiting.values()))


def _bases_of(job_ids: set[str]) -> str:
    return ",".join(sorted({re.sub(r"_\d+$", "", job_id) for job_id in job_ids}))


def _say(
    folder: SweepFolder,
    numbers: Sequence[int],
    waiting: Mapping[int, str],
    states: Mapping[str, str] | None,
    said: str,
) -> str:
    """Log how far the sweep is, if that has changed."""
    outcomes = [outcome.state for number in numbers if (outcome := folder.outcome(number))]
    if states is None:
        text = "the queue does not answer; asking again"
    else:
        counts = Counter([*outcomes, *(states.get(job, "unknown").lower() for job in waiting.values())])
        text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    if text != said:
        log.info("%s", text)
    return text
