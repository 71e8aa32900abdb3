"""Weights & Biases beside the run directory. A tracker's failure is a warning, never the run's end."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lowrank_kit.config import TrackerConfig

log = logging.getLogger(__name__)

# What is small, and enough to build every table and to repeat the run.
ARTEFACT = ("config.yaml", "manifest.json", "plan.json", "results.json", "history.json", "log.txt")
MODELS = ("recovered", "checkpoint", "adapter")


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Send metrics of one optimiser step."""

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Set the run's final figures."""

    def finish(self, exit_code: int) -> None:
        """Send what the run directory holds and end the run; 0 means that everything asked for was done."""


class NullTracker:
    """Sends nothing."""

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Do nothing."""

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


class WandbTracker:
    """Weights & Biases; a resumed run directory continues the same W&B run.

    Runs are grouped by the folder that their directories lie in, so a sweep with a `run.root` of its own is a group.
    """

    def __init__(self, settings: TrackerConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        # Imported only here, so that a run without W&B never loads it.
        import wandb

        self._settings, self._folder, self._wandb = settings, run_dir, wandb
        names = [str(config[section]["name"]) for section in ("method", "model", "task") if section in config]
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or run_dir.resolve().parent.name,
            mode=settings.mode,
            id=run_id(run_dir),
            name=run_dir.resolve().name,
            job_type=names[0] if names else None,
            # W&B takes no longer ones.
            tags=[name[:64] for name in names],
            dir=run_dir,
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        log.info("W&B run: %s", self._run.dir if self._run.offline else self._run.url)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Send metrics of one optimiser step."""
        with _tolerated("log metrics"):
            self._run.log(dict(metrics), step=step)

    def summary(self, metrics: Mapping[str, float | int]) -> None:
        """Set the run's final figures."""
        with _tolerated("write the summary"):
            self._run.summary.update(dict(metrics))

    def finish(self, exit_code: int) -> None:
        """Send plots, tables and artefacts, as far as the run directory has them, and end with the exit code."""
        with _tolerated("send plots and tables"):
            if media := {**self._plots(), **self._tables()}:
                self._run.log(media)
        with _tolerated("send the artefacts"):
            self._send_artefacts()
        with _tolerated("finish the run"):
            self._run.finish(exit_code=exit_code)

    def _plots(self) -> dict[str, Any]:
        files = sorted((self._folder / "plots").glob("*.png"))
        return {f"plots/{file.stem}": self._wandb.Image(str(file)) for file in files}

    def _tables(self) -> dict[str, Any]:
        results = self._folder / "results.json"
        found = {"evaluation": json.loads(results.read_text("utf-8"))} if results.is_file() else {}
        if self._settings.samples:
            for file in sorted((self._folder / "samples").glob("*/*.jsonl")):
                lines = file.read_text("utf-8").splitlines()
                found[f"samples/{file.parent.name}/{file.stem}"] = [json.loads(line) for line in lines]
        return {name: self._table(rows) for name, rows in found.items() if rows}

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # A column of W&B's has one type, and none of them is a list or a mapping of any shape.
        plain = [[_plain(row.get(column)) for column in columns] for row in rows]
        return self._wandb.Table(columns=columns, data=plain)

    def _send_artefacts(self) -> None:
        name = run_id(self._folder)
        artefact = self._wandb.Artifact(f"{name}-results", "results")
        for file in (self._folder / entry for entry in ARTEFACT):
            if file.is_file():
                artefact.add_file(str(file))
        self._run.log_artifact(artefact)
        folder = next((self._folder / entry for entry in MODELS if (self._folder / entry).is_dir()), None)
        if self._settings.checkpoint and folder is not None:
            artefact = self._wandb.Artifact(f"{name}-{folder.name}", "model")
            # Immutable: W&B reads the files where they lie, and makes no second copy of a model on this disk.
            artefact.add_dir(str(folder), policy="immutable")
            self._run.log_artifact(artefact)


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


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


@contextmanager
def _tolerated(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("W&B could not %s: %s: %s", action, type(error).__name__, error)
