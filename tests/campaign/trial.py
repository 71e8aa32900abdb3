"""A command in a process that is forked from one with the imports done: a start costs milliseconds, not seconds."""

import multiprocessing
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["lowrank_kit.pipeline", "lowrank_kit.sweep.run_sweep", "lowrank_kit.report.command", "peft", "transformers"]


def context() -> Any:
    """Where trials are started from, with what they import."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["trial", *PRELOAD])
    return found


def start(
    words: Iterable[str], log: Path, environment: Mapping[str, str], limits: Mapping[int, int] | None = None
) -> BaseProcess:
    """Begin ``lowrank-kit WORDS``; what it says goes to ``log``. ``limits`` are of `resource`."""
    process: BaseProcess = context().Process(
        target=_work, args=(list(words), str(log), dict(environment), dict(limits or {}))
    )
    process.start()
    return process


def _work(words: list[str], log: str, environment: dict[str, str], limits: dict[int, int]) -> None:
    from lowrank_kit.commands import main

    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    sys.exit(main(words))
