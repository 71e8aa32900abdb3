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

An answer and its tests are two programs, each in a jail of its own, that talk over a socket (`dialogue`). The tests
call the answer's functions and compare the values that come back, which are of Python's own types. The answer passes
if the tests print a token behind their last line. That token is in no process and in no file of the answer's.
"""

import json
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_kit.errors import LowRankKitError

JAIL = Path(__file__).with_name("jail.py")
DIALOGUE = Path(__file__).with_name("dialogue.py")


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
    """Of each file."""
    output: int = 2**24
    """Of all that is printed."""
    disk: int = 2**24
    """Of all files together."""
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """What came of a program; the message is the last line that it printed, or what was exceeded."""

    status: Literal["passed", "failed", "timed_out"]
    message: str = ""


LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """What a model wrote, ``answer``, and what tests it.

    ``given`` is run before the ``tests``, apart from the answer. ``tests`` may use every name of ``given``, and of the
    answer ``entry`` and those that are neither in ``given`` nor Python's own.
    """

    answer: str
    tests: str = ""
    given: str = ""
    entry: str | None = None


def run_program(program: Program | str, limits: Limits = LIMITS) -> Outcome:
    """Run a program with its tests to its end; of a text alone, that it runs to its end is all that is asked.

    Raises `LowRankKitError` where programs cannot be kept apart from the machine.
    """
    asked = Program(program) if isinstance(program, str) else program
    token = secrets.token_hex(16)
    request = {"token": token, "tests": asked.tests, "given": asked.given, "entry": asked.entry}
    script = DIALOGUE.read_text("utf-8")
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        files = {DIALOGUE.name: script, "program.py": asked.answer}
        answer = stack.enter_context(_jailed("answer", files, theirs, limits))
        files = {DIALOGUE.name: script, "request.json": json.dumps(request)}
        evaluator = stack.enter_context(_jailed("evaluator", files, ours, limits))
        found = _outcome_of(evaluator)
        if found["status"] == 0 and token in found["output"]:
            return Outcome("passed")
        if found["status"] == 1:
            return Outcome("failed", _last_line(found["output"]) or "its tests failed")
        # The answer ended, or its time was up.
        found = _outcome_of(answer)
    if found["status"] is None:
        return Outcome("timed_out", f"after {limits.seconds} s")
    # Whose own clock runs a little behind that of the limit; no program can kill itself, being its namespace's first.
    if found["status"] == -signal.SIGKILL and found["cpu_seconds"] > 0.9 * limits.cpu_seconds:
        return Outcome("timed_out", f"after {limits.cpu_seconds} s of CPU time")
    return Outcome("failed", _last_line(found["output"]) or f"ended with status {found['status']} before its tests")


def _last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2][:200]


def check_sandbox() -> None:
    """Raise `LowRankKitError` where programs cannot be run in the sandbox."""
    if (outcome := run_program("")).status != "passed":
        raise LowRankKitError(f"no Python program runs in the sandbox: {outcome.message}")


@contextmanager
def _jailed(
    role: str, files: Mapping[str, str], connection: socket.socket, limits: Limits
) -> Iterator["subprocess.Popen[str]"]:
    """Start one side of the dialogue; when the block ends, so does it."""
    if sys.platform != "linux":
        raise _unavailable(f"it needs Linux, this is {sys.platform}")
    with tempfile.TemporaryDirectory() as root, connection:
        request = {
            "files": files, "words": [DIALOGUE.name, role], "connection": connection.fileno(), "root": root,
            **asdict(limits),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={}, start_new_session=True, text=True, encoding="utf-8", pass_fds=[connection.fileno()],
        )  # fmt: skip
        try:
            # The other side must hear when this one ends.
            connection.close()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            process.stdin = None
            yield process
        finally:
            process.terminate()
            process.communicate()


def _outcome_of(process: "subprocess.Popen[str]") -> dict[str, Any]:
    answer, errors = process.communicate()
    found: dict[str, Any] = json.loads(answer) if answer else {"unavailable": errors.strip()[-1000:]}
    if why := found.get("unavailable"):
        raise _unavailable(why)
    return found


def _unavailable(why: str) -> LowRankKitError:
    return LowRankKitError(
        f"code that a model wrote cannot be run safely on this machine ({why}): the sandbox needs Linux 5.12 or later "
        "and the right to make namespaces (as root: CAP_SYS_ADMIN; otherwise unprivileged user namespaces); elsewhere "
        "leave out the benchmarks that are scored by pass@k (~task.benchmarks.NAME)"
    )
