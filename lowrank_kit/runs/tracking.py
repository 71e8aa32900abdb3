"""Metrics sent elsewhere besides the run directory. A tracker's failure is a warning, never the run's end."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lowrank_kit.config import TrackerConfig

log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Send metrics of one optimiser step."""

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Set the run's final figures."""

    def finish(self, exit_code: int) -> None:
        """End the run; 0 means that everything asked for was done."""


class NullTracker:
    """Sends nothing."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Do nothing."""

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


class WandbTracker:
    """Weights & Biases; a resumed run directory continues the same W&B run."""

    def __init__(self, settings: TrackerConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        # Imported only here, so that a run without W&B never loads it.
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            mode=settings.mode,
            id=run_id(run_dir),
            name=run_dir.resolve().name,
            dir=run_dir,
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        log.info("W&B run: %s", self._run.url if settings.mode == "online" else self._run.dir)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Send metrics of one optimiser step."""
        with _tolerated("log metrics"):
            self._run.log(dict(metrics), step=step)

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Set the run's final figures."""
        with _tolerated("write the summary"):
            self._run.summary.update(dict(metrics))

    def finish(self, exit_code: int) -> None:
        """End the run with the process's exit code."""
        with _tolerated("finish the run"):
            self._run.finish(exit_code=exit_code)


def open_tracker(settings: TrackerConfig, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Open the chosen tracker; one that cannot be opened is replaced by none, with a warning."""
    if settings.kind == "wandb":
        with _tolerated("start; this run is not tracked"):
            return WandbTracker(settings, run_dir, config)
    return NullTracker()


def run_id(run_dir: Path) -> str:
    """Return the W&B id of a run directory: its name, made unique by its path if the name holds no hash."""
    path = run_dir.resolve()
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.name)[:100]
    if re.search(r"-[0-9a-f]{8}-s\d+$", name):
        return name
    return f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


@contextmanager
def _tolerated(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("W&B could not %s: %s: %s", action, type(error).__name__, error)
