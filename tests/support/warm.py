"""Python commands in processes of their own, forked from one that has imported torch, transformers and the like.

A fresh interpreter spends five seconds of CPU time on these imports, and the suite starts a hundred. Our package is not
among them: every process imports it anew, or not at all. What depends on the interpreter's own start (its flags, the
variables that libraries read when they are imported, what is imported when) is for `subprocess`.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

LIBRARIES = [
    *("torch", "transformers.modeling_utils", "transformers.trainer", "transformers.models.auto.modeling_auto"),
    *("peft", "datasets", "lm_eval", "sklearn.metrics", "scipy.linalg", "matplotlib.pyplot", "hydra.main", "pydantic"),
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


class Command:
    """`python WORDS`, running: `-m MODULE ...`, `-c CODE ...` or `FILE ...`, with what it prints in files."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._printed = {1: Path(self._folder.name, "stdout"), 2: Path(self._folder.name, "stderr")}
        settings = (list(words), dict(os.environ if env is None else env), cwd or Path.cwd(), self._printed)
        self._process = CONTEXT.Process(target=_become, args=settings)
        self._process.start()

    @property
    def stdout(self) -> str:
        return self._printed[1].read_text()

    @property
    def stderr(self) -> str:
        return self._printed[2].read_text()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> int:
        """The exit status, a signal's number below zero."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self.stderr
        return self._process.exitcode


def run(
    words: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([python, *words], capture_output=True, text=True)`."""
    command = Command(words, env, cwd)
    done = subprocess.CompletedProcess(words, command.wait(), command.stdout, command.stderr)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def run_in_two(
    words: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `torchrun --nproc-per-node 2 WORDS`; what the first says comes before what the second says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [Command(words, {**env, **everyone, "RANK": rank, "LOCAL_RANK": rank}, cwd) for rank in "01"]
    status = max(abs(command.wait()) for command in both)
    return subprocess.CompletedProcess(words, status, "".join(c.stdout for c in both), "".join(c.stderr for c in both))


def _become(words: list[str], env: dict[str, str], cwd: Path, printed: dict[int, Path]) -> None:
    """What the interpreter does with its command line, after the fork."""
    for descriptor, file in printed.items():
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = io.StringIO()
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [words[0], *words[2 if words[0] in ("-m", "-c") else 1 :]]
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # multiprocessing ends its processes without these.
        atexit._run_exitfuncs()
