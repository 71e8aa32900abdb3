"""Where the stages of one task's run put what they find."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest, peak_rss_bytes
from lowrank_kit.runs.tracking import Tracker


@dataclass(frozen=True)
class Workplace:
    """The run directory with its manifest, the tracker, and the root of all caches (None: nothing is shared)."""

    run: RunDirectory
    manifest: Manifest
    tracker: Tracker
    caches: Path | None

    @property
    def cache(self) -> Path | None:
        """The folder of statistics, by content."""
        return self.caches / "calibration" if self.caches else None

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.run.path

    @property
    def initialisation(self) -> dict[str, Any]:
        """What the parts of an adapter's start took, as far as the manifest tells."""
        return self.manifest.as_dict().get("initialisation", {})

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Note in the manifest what a part of an adapter's start took; the peak is the process's until then."""
        started = time.perf_counter()
        yield
        figures = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        if torch.cuda.is_available():
            figures["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self.manifest.record("initialisation", self.initialisation | {part: figures})
