"""Start the jobs of a sweep and wait for all of them, whatever becomes of any."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from lowrank_kit.config.sweeps import InProcess, Joblib, Launcher
from lowrank_kit.console import set_up_console
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.sweep.job import SweepFolder
from lowrank_kit.sweep.queue import launch_queued

log = logging.getLogger(__name__)


def launch(folder: SweepFolder, numbers: Sequence[int], launcher: Launcher) -> dict[int, str]:
    """Do these jobs; return by number what is known of those that left no outcome.

    Raises `ConfigError` where the launcher's own package or program is missing, before any job begins.
    """
    if isinstance(launcher, InProcess):
        return _in_this_process(folder, numbers)
    if isinstance(launcher, Joblib):
        return _side_by_side(folder, numbers, launcher)
    return launch_queued(folder, numbers, launcher)


def _in_this_process(folder: SweepFolder, numbers: Sequence[int]) -> dict[int, str]:
    set_up_console()
    for number in numbers:
        try:
            print(f"run: {folder.run(number)}", flush=True)
        except LowRankKitError as error:
            log.error("job %d failed: %s", number, error)
        except Exception:
            log.exception("job %d failed", number)
    return {}


def _side_by_side(folder: SweepFolder, numbers: Sequence[int], settings: Joblib) -> dict[int, str]:
    from joblib import Parallel, delayed

    environment = dict(os.environ)
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    started: list[subprocess.Popen[bytes]] = []

    # A thread of joblib's waits for a process: one that is killed, for memory say, takes no other along.
    def work(number: int) -> int:
        words = [sys.executable, "-m", "lowrank_kit.sweep.job", str(folder.path), str(number)]
        with folder.log_file(number).open("wb") as output:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
            started.append(process)
            status = process.wait()
        log.info("job %d ended with exit status %d", number, status)
        return status

    log.info("%d jobs, %d at a time; their output is in %s", len(numbers), settings.n_jobs, folder.path / "jobs")
    try:
        statuses = Parallel(n_jobs=settings.n_jobs, backend="threading", batch_size=1)(
            delayed(work)(number) for number in numbers
        )
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
    return {
        number: f"ended with exit status {status}; see {folder.log_file(number)}"
        for number, status in zip(numbers, statuses, strict=True)
    }
