"""The run directories below some folders, and what they hold."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank_kit.config import load
from lowrank_kit.config.plugins import allowing
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.records import EvalRecord, read_records
from lowrank_kit.files import checked, read_json, read_yaml
from lowrank_kit.runs.directory import flatten, identity, without_seed
from lowrank_kit.runs.status import read_status


@dataclass(frozen=True)
class Run:
    """A finished run with results; ``config`` is plain JSON, ``recipe`` what its seeds have in common."""

    path: Path
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    seed: int
    records: tuple[EvalRecord, ...]
    manifest: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"]["name"])

    @property
    def model(self) -> str:
        """The model's short name."""
        return str(self.config["model"]["name"])

    @property
    def budget(self) -> tuple[str, float] | None:
        """How much the method may keep or add: its ratio, else its rank, by name."""
        method = self.config["method"]
        return next(((key, float(method[key])) for key in ("ratio", "rank") if method.get(key) is not None), None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted key, without the task: what two rows of a table may differ in."""
        return {key: value for key, value in flatten(self.recipe).items() if not key.startswith("task.")}


@dataclass(frozen=True)
class LeftOut:
    """A run directory that is in no table, and why."""

    path: Path
    state: str
    reason: str


def find_runs(folders: Sequence[Path], named: Sequence[str] = ()) -> tuple[list[Run], list[LeftOut]]:
    """Read every run directory in or below ``folders``: those with results, and the others with the reason.

    Nothing that a run names is imported, but for packages of methods in ``named``. One that is damaged is left out as
    an unfinished one is. A group's members are read, its own summary of them is not. Raises `ConfigError` for a folder
    that does not exist or holds no run, naming near ones.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        below = list(_run_directories(folder)) if folder.is_dir() else []
        if not below:
            raise ConfigError(_nothing_in(folder))
        found |= dict.fromkeys(below)
    runs: dict[str, Run] = {}
    left_out = []
    for path in found:
        try:
            read = _read(path, named)
        except LowRankKitError as error:
            read = LeftOut(path, "damaged", str(error).splitlines()[0])
        if isinstance(read, LeftOut):
            left_out.append(read)
        elif read is not None:
            key = json.dumps([read.recipe, read.seed], sort_keys=True)
            if key in runs:
                left_out.append(LeftOut(path, "complete", f"same configuration and seed as {runs[key].path}"))
            runs.setdefault(key, read)
    return list(runs.values()), left_out


def _run_directories(folder: Path) -> Iterator[Path]:
    for path, below, files in os.walk(folder):
        below.sort()
        if "config.yaml" in files and {"status.json", "results.json"} & set(files):
            yield Path(path)
            # Of what lies in a run directory only a group's members are runs.
            below[:] = [name for name in below if (Path(path, name) / "config.yaml").is_file()]


def _nothing_in(folder: Path) -> str:
    if folder.is_dir():
        return f"'{folder}' holds no run: no folder in or below it has config.yaml and status.json"
    parent = folder.parent
    near = get_close_matches(folder.name, [p.name for p in parent.iterdir()] if parent.is_dir() else [], n=3)
    hint = f"; did you mean {' or '.join(repr(str(parent / name)) for name in near)}?" if near else ""
    return f"'{folder}' is not a folder{hint}"


def _read(path: Path, named: Sequence[str]) -> Run | LeftOut | None:
    config = allowing(read_yaml(path / "config.yaml"), named)
    shown = checked(_Shown, config, path / "config.yaml")
    status = read_status(path)
    state = status.state if status else "unknown"
    if state != "complete":
        stage = f" in stage {status.stage}" if status and status.stage else ""
        reason = (status.error if status else "there is no status.json") or "not finished"
        return LeftOut(path, f"{state}{stage}", reason.splitlines()[0])
    if shown.task.get("kind") == "group":
        return None
    records = read_records(path / "results.json")
    if not records:
        return LeftOut(path, state, f"nothing was evaluated: run.stages={config['run'].get('stages')}")
    recipe, seed = without_seed(_known_settings(config))
    manifest = read_json(path / "manifest.json", dict) or {}
    checked(_Facts, manifest, path / "manifest.json")
    return Run(path, config, recipe, seed, tuple(records), manifest)


@dataclass(frozen=True)
class _Shown:
    """What a report shows of a configuration, whatever wrote it."""

    method: "_Named"
    model: "_Model"
    task: dict[str, Any]
    seed: int
    dtype: str


@dataclass(frozen=True)
class _Named:
    name: str
    ratio: float | None = None
    rank: float | None = None


@dataclass(frozen=True)
class _Model:
    name: str
    path: str
    revision: str | None = None


@dataclass(frozen=True)
class _Split:
    source: str
    rows: int
    sha256: str
    note: str


@dataclass(frozen=True)
class _Git:
    revision: str
    dirty: bool


@dataclass(frozen=True)
class _Facts:
    """What a report shows of a manifest."""

    size: dict[str, dict[str, int]] = field(default_factory=dict)
    trained_parameters: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, _Split] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: _Git | None = None
    command: tuple[str, ...] = ()


def _known_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without `run` and `tracker`, with the defaults of settings that are younger than the run."""
    try:
        return identity(load(config))
    except ConfigError:
        # Of a method that cannot be imported here, or of a setting that is gone: as it was written.
        return {key: value for key, value in config.items() if key not in ("run", "tracker", "runtime")}


def without(runs: Iterable[Run], ignored: Sequence[str]) -> list[Run]:
    """Take settings out of the recipes, by dotted key or section, so that they make no row of their own."""

    def kept(value: Any, prefix: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        inner = {key: (inner, f"{prefix}{key}") for key, inner in value.items()}
        return {key: kept(below, f"{name}.") for key, (below, name) in inner.items() if name not in ignored}

    return [replace(run, recipe=kept(run.recipe, "")) for run in runs]
