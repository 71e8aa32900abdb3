"""The manifest: everything one needs to know to believe, or to repeat, a run."""

import logging
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lowrank_kit import __version__

PACKAGES = ("torch", "transformers", "peft", "datasets")


class Manifest:
    """Collects facts about one run; `as_dict` is what `manifest.json` holds.

    `earlier` is the manifest of a process that worked in the same directory before: its stages, its warnings and
    what only it recorded are kept.
    """

    def __init__(self, seed: int, device: str, earlier: Mapping[str, Any] | None = None) -> None:
        previous = earlier or {}
        self._facts: dict[str, Any] = {
            **{key: fact for key, fact in previous.items() if key not in ("stages", "warnings")},
            "versions": {
                "lowrank_kit": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "git": git_revision(Path(__file__).resolve().parents[2]),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "seed": seed,
            "device": {"name": device, "hardware": _hardware(device), "threads": torch.get_num_threads()},
        }
        self._stages: dict[str, Any] = dict(previous.get("stages", {}))
        self._warnings = Counter({w["message"]: w["count"] for w in previous.get("warnings", [])})

    def record(self, key: str, value: Any) -> None:
        """Add a JSON value, for example `data` (source, note, hash of each split) or `model`."""
        self._facts[key] = value

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON; warnings in the order they first appeared, each once with its count."""
        found = [{"message": message, "count": count} for message, count in self._warnings.items()]
        return {**self._facts, "stages": self._stages, "warnings": found}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and measure memory; a stage that fails is recorded too.

        `peak_rss_bytes` is the highest resident memory of the process until the stage's end, not of the stage
        alone; `peak_cuda_bytes` is the stage's own.
        """
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started, clock = time.time(), time.perf_counter()
        try:
            yield
        finally:
            measured: dict[str, float] = {
                "started": started,
                "seconds": time.perf_counter() - clock,
                "peak_rss_bytes": peak_rss_bytes(),
            }
            if torch.cuda.is_available():
                measured["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
            self._stages[name] = measured

    def seconds(self, stage: str) -> float:
        """Return how long a stage took."""
        return float(self._stages[stage]["seconds"])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every warning raised in the block through `warnings` or this package's logger.

        They are still shown as they would have been.
        """
        handler = _Recorder(self._warnings)
        logger = logging.getLogger("lowrank_kit")
        show = warnings.showwarning

        def record_and_show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            self._warnings[f"{category.__name__}: {message}"] += 1
            show(message, category, *rest, **more)

        with ExitStack() as undo:
            undo.callback(setattr, warnings, "showwarning", show)
            undo.callback(logger.removeHandler, handler)
            warnings.showwarning = record_and_show
            logger.addHandler(handler)
            yield


class _Recorder(logging.Handler):
    def __init__(self, warnings: Counter[str]) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self._warnings[f"{record.name}: {record.getMessage()}"] += 1


def peak_rss_bytes() -> int:
    """Return the highest resident memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_revision(checkout: Path) -> dict[str, Any] | None:
    """Return the commit and whether files differ from it; None if `checkout` is not the root of a repository.

    An installed package inside somebody else's repository must not take that repository's commit for its own.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
