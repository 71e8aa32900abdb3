"""What a run directory says of itself: `status.json`, and whether its files are still those that the run left."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import psutil

from lowrank_kit.files import damaged, read_as
from lowrank_kit.lock import SILENCE_SECONDS, process_alive
from lowrank_kit.runs.checksums import Checksum, differing

State = Literal["running", "complete", "failed", "interrupted", "damaged"]

STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Status:
    """Content of `status.json`: what the run is doing, and which process does it. Times in Unix seconds."""

    state: State
    stage: str | None = None
    stages_done: tuple[str, ...] = ()
    error: str | None = None
    pid: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    files: Mapping[str, Mapping[str, Checksum]] = field(default_factory=dict)
    """Checksums of what every finished stage left, by its path; under `END` those of what the run left besides."""

    def process_alive(self) -> bool:
        """Whether the recorded process still runs; from another host, whether it was heard of lately."""
        if self.hostname != socket.gethostname():
            return time.time() - self.updated < SILENCE_SECONDS
        return process_alive(self.pid, self.process_started)


END = "end"


def read_status(path: Path | str, thorough: bool = False) -> Status | None:
    """Read a run directory's status; None if there is none.

    A run that says `running` but whose process is gone (SIGKILL, power failure) is reported as `interrupted`. One that
    does not run, and of which a file is gone or was altered since, is reported as `damaged`; its ``error`` says which.
    Files of an unchanged size and time are read again only if ``thorough``. Raises `DamagedFileError` for a
    `status.json` that is not whole.
    """
    file = Path(path) / STATUS_FILE
    status: Status | None = read_as(file, Status)
    if status is None:
        return None
    sums = {name: one for of_stage in status.files.values() for name, one in of_stage.items()}
    if outside := [name for name in sums if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise damaged(file, f"it names a file outside its folder, '{outside[0]}'")
    if status.state == "running":
        if status.process_alive():
            return status
        status = replace(status, state="interrupted")
    if found := differing(Path(path), sums, thorough):
        return replace(status, state="damaged", error="; ".join(found))
    return status
