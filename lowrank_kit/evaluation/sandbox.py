"""Run programs that a model wrote, so that whatever they do, nothing happens: Linux namespaces and resource limits.

A program gets a process of its own inside new PID, mount, network and IPC namespaces:

- no file of the machine but the interpreter, its libraries and ``/usr``, all read-only; an empty folder in memory as
  working directory and home, gone with the program;
- no network, not even loopback; no environment, no standard input, no process of the machine to be seen or signalled;
- limits of wall and CPU time, address space of a process, number of processes, size of a file; the first process is
  killed at the end and with it, by the kernel, all that it started, in whatever session they are;
- no privileges: as root it becomes a user that nobody else is; otherwise a user namespace is entered, which is left
  behind with the capabilities that were needed. Set-user-ID programs are without effect.

Where the kernel does not allow that (no Linux, or below 5.12; a container without CAP_SYS_ADMIN and without user
namespaces), nothing is run: `LowRankKitError`.

A program passes if it ends with status 0 behind a token that its last line prints. An answer can end early in whatever
way: without the token it is wrong. The token is new for each program and cannot be guessed; but it stands in the
program's own text, so that an answer written against this very harness could look it up.
"""

import json
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_kit.errors import LowRankKitError

JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, bytes, processes (threads count)."""

    cpu_seconds: int = 20
    """Of each process."""
    seconds: int = 60
    """Until all is over; on a busy machine a program waits for its CPU time."""
    memory: int = 2**29
    """Address space of each process."""
    file_size: int = 2**20
    """Of each file, and of the output."""
    disk: int = 2**24
    """Of all files together."""
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """What came of a program; the message is the last line that it printed, or what was exceeded."""

    status: Literal["passed", "failed", "timed_out"]
    message: str = ""


LIMITS = Limits()


def run_program(program: str, limits: Limits = LIMITS) -> Outcome:
    """Run a program with its tests to its end.

    Raises `LowRankKitError` where programs cannot be kept apart from the machine.
    """
    token = secrets.token_hex(16)
    text = f"{program}\n\n__import__('os').write(1, b'{token}')\n"
    with tempfile.TemporaryDirectory() as root:
        request = {"program": text, "root": root, **asdict(limits)}
        found = _in_jail(request)
    output = found["output"]
    if found["status"] is None:
        return Outcome("timed_out", f"after {limits.seconds} s")
    # Whose own clock runs a little behind that of the limit; no program can kill itself, being its namespace's first.
    if found["status"] == -signal.SIGKILL and found["cpu_seconds"] > 0.9 * limits.cpu_seconds:
        return Outcome("timed_out", f"after {limits.cpu_seconds} s of CPU time")
    if found["status"] == 0 and token in output:
        return Outcome("passed")
    last = output.strip().rpartition("\n")[2][:200]
    return Outcome("failed", last or f"ended with status {found['status']} before its tests")


def check_sandbox() -> None:
    """Raise `LowRankKitError` where programs cannot be run in the sandbox."""
    if (outcome := run_program("")).status != "passed":
        raise LowRankKitError(f"no Python program runs in the sandbox: {outcome.message}")


def _in_jail(request: Mapping[str, Any]) -> dict[str, Any]:
    if sys.platform != "linux":
        raise _unavailable(f"it needs Linux, this is {sys.platform}")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(JAIL)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={}, start_new_session=True, text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        answer, errors = process.communicate(json.dumps(request))
    finally:
        process.terminate()
        process.wait()
    found = json.loads(answer) if answer else {"unavailable": errors.strip()[-1000:]}
    if why := found.get("unavailable"):
        raise _unavailable(why)
    return found


def _unavailable(why: str) -> LowRankKitError:
    return LowRankKitError(
        f"code that a model wrote cannot be run safely on this machine ({why}): the sandbox needs Linux 5.12 or later "
        "and the right to make namespaces (as root: CAP_SYS_ADMIN; otherwise unprivileged user namespaces); elsewhere "
        "leave out the benchmarks that are scored by pass@k (~task.benchmarks.NAME)"
    )
