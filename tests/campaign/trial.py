"""A command in a process that is forked from one with the imports done: a start costs milliseconds, not seconds."""

import hashlib
import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["lowrank_kit.pipeline", "lowrank_kit.sweep.run_sweep", "lowrank_kit.report.command", "peft", "transformers"]


@dataclass(frozen=True)
class Machine:
    """What a command finds. ``limits`` are of `resource`; that on address space comes on top of what is used."""

    limits: Mapping[int, int] = field(default_factory=dict)
    umask: int | None = None
    user: int | None = None
    draws: bool = False
    """Whether figures are drawn; elsewhere their files are empty. It takes as long as the rest of a tiny run."""


def context() -> Any:
    """Where trials are started from, with what they import."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["trial", *PRELOAD])
    return found


def start(words: Iterable[str], log: Path, environment: Mapping[str, str], machine: Machine) -> BaseProcess:
    """Begin ``lowrank-kit WORDS``; what it says goes to ``log``."""
    process: BaseProcess = context().Process(target=_work, args=(list(words), str(log), dict(environment), machine))
    process.start()
    return process


def _work(words: list[str], log: str, environment: dict[str, str], machine: Machine) -> None:
    from matplotlib.figure import Figure

    from lowrank_kit.commands import main

    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if not machine.draws:
        Figure.savefig = lambda self, file, **_: Path(file).touch()  # type: ignore[method-assign]
    if machine.umask is not None:
        os.umask(machine.umask)
    if machine.user is not None:
        os.setgroups([])
        os.setgid(machine.user)
        os.setuid(machine.user)
    for limit, most in machine.limits.items():
        if limit == resource.RLIMIT_AS:
            most += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(limit, (most, most))
    sys.exit(main(words))


def left(root: Path) -> dict[str, Any]:
    """What must not depend on how often a run was begun: plans, figures, weights."""
    found: dict[str, Any] = {}
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if "checkpoints/" in name or "sweeps/" in name:
            continue
        if file.name in ("plan.json", "results.json"):
            found[name] = json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def litter(root: Path, goes_on: bool = False) -> list[str]:
    """Temporary files, halves and locks; where a run ``goes_on``, but for the folders of what it goes on from."""
    names = [file.relative_to(root) for file in root.rglob("*")]
    if goes_on:
        names = [name for name in names if not {".checkpoint", ".unfinished"} & set(name.parts)]
    ends = (".tmp", ".partial", ".claim", ".new")
    return [str(n) for n in names if n.name.startswith(".") or n.suffix in ends or n.name == "lock.json"]
