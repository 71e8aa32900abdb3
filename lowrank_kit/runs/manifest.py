"""The manifest: everything one needs to know to believe, or to repeat, a run."""

import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lowrank_kit.runs.provenance import software


class Manifest:
    """Collects facts about one run; `as_dict` is what `manifest.json` holds.

    `earlier` is the manifest of a process that worked in the same directory before: its stages, its warnings and
    what only it recorded are kept.
    """

    def __init__(self, seed: int, device: str, earlier: Mapping[str, Any] | None = None) -> None:
        previous, made_by = earlier or {}, software()
        self._facts: dict[str, Any] = {
            **{key: fact for key, fact in previous.items() if key not in ("stages", "warnings")},
            **made_by,
            "processes": _with(previous.get("processes", []), {key: made_by[key] for key in ("git", "command")}),
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


def _with(processes: list[dict[str, Any]], process: dict[str, Any]) -> list[dict[str, Any]]:
    """Every state of the code and command that worked on the run, each once."""
    return processes if process in processes else [*processes, process]


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
