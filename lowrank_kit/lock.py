"""One holder at a time, by the rules of network file systems: links, renames and modification times, never flock."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import DamagedFileError, read_as

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20.0
# A process on another host cannot be looked up; it is dead after this many seconds of silence. Attributes of a file
# on NFS may be a minute old.
SILENCE_SECONDS = 15 * HEARTBEAT_SECONDS
SECONDS_BETWEEN_NOTES = 60.0


def process_alive(pid: int, started: float) -> bool:
    """Whether the process of this host with this pid and start time (Unix seconds) still runs."""
    # A pid is reused; a pid together with its start time is not. The clock may be adjusted by a little.
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; what the lock's file says."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    hostname: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())
    slurm_job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    slurm_restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def __str__(self) -> str:
        job = f" (SLURM job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.pid} on {self.hostname}{job}"

    def alive(self) -> bool | None:
        """Whether the process still runs; None where only its heartbeat can tell."""
        if self.hostname == socket.gethostname():
            return process_alive(self.pid, self.process_started)
        here = Holder()
        if self.slurm_job and self.slurm_job == here.slurm_job and self.slurm_restart < here.slurm_restart:
            # SLURM ends every process of a job before it starts the job again.
            return False
        return None


class Lock:
    """A file that is there while somebody holds it; its modification time is the holder's heartbeat.

    It is made by a hard link, which only one process can make. A dead holder's is taken over: by a process that
    finds its process gone on the same host, or a later start of the same SLURM job, or no heartbeat for
    `SILENCE_SECONDS` by the file server's clock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._me: Holder | None = None
        self._released = threading.Event()

    def try_acquire(self) -> Holder | None:
        """Take the lock and return None, or return the living holder.

        Raises `DamagedFileError` for a lock that does not say who holds it.
        """
        me = Holder()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = self.path.with_name(f".{self.path.name}.{me.token}.tmp")
        try:
            record.write_text(json.dumps(asdict(me)))
            while True:
                with suppress(FileExistsError):
                    os.link(record, self.path)
                # The answer to a link that was made may get lost on the way: the count of names tells.
                if record.stat().st_nlink == 2:
                    break
                holder = self._holder()
                if holder is not None:
                    if not self._stale(holder, record):
                        return holder
                    if self._only_for(holder, lambda: record.replace(self.path)):
                        log.info("%s was left by %s, which is gone", self.path.name, holder)
                        break
                    time.sleep(0.05)
        finally:
            record.unlink(missing_ok=True)
        self._me = me
        self._released.clear()
        threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True).start()
        return None

    def release(self) -> None:
        """Give the lock back, unless it was taken over."""
        assert self._me is not None
        self._released.set()
        try:
            self._only_for(self._me, self.path.unlink)
        except DamagedFileError as error:
            log.error("%s", error)
        except OSError:
            # A disk that is full in the middle of a block has no room for a claim.
            with suppress(OSError):
                self.path.unlink()
        self._me = None

    def _holder(self) -> Holder | None:
        holder: Holder | None = read_as(self.path, Holder, "if no process works there, remove this file")
        return holder

    def _stale(self, holder: Holder, record: Path) -> bool:
        if (alive := holder.alive()) is not None:
            return not alive
        with suppress(FileNotFoundError):
            # Both times by the file server's clock.
            os.utime(record)
            return record.stat().st_mtime - self.path.stat().st_mtime > SILENCE_SECONDS
        return False

    def _only_for(self, holder: Holder, change: Callable[[], object]) -> bool:
        """Make a change to the lock's file if it is still this holder's; of several processes, one at most does."""
        claim = self.path.with_name(f".{self.path.name}.{holder.token}.claim")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            with suppress(FileNotFoundError):
                # Whoever made it died within the microseconds that a claim lasts.
                if time.time() - claim.stat().st_mtime > SILENCE_SECONDS:
                    claim.unlink()
            return False
        try:
            present = self._holder()
            if present is None or present.token != holder.token:
                return False
            change()
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A network file system that does not answer for a while is no reason to stop.
            with suppress(OSError, LowRankKitError):
                holder = self._holder()
                if self._me is None or holder is None or holder.token != self._me.token:
                    log.error("%s was taken over: this process was silent for too long", self.path)
                    return
                os.utime(self.path)


@contextmanager
def exclusively(path: Path, what: str, seconds_between_looks: float = 2.0) -> Iterator[None]:
    """Hold the lock `path` for a block; while another process has it, say so now and then, and wait."""
    lock, note_due = Lock(path), 0.0
    started = time.monotonic()
    while (holder := lock.try_acquire()) is not None:
        if time.monotonic() >= note_due:
            log.info("waiting for the %s that %s computes", what, holder)
            note_due = time.monotonic() + SECONDS_BETWEEN_NOTES
        time.sleep(seconds_between_looks)
    if note_due:
        log.info("waited %.0f s for the %s", time.monotonic() - started, what)
    try:
        yield
    finally:
        lock.release()
