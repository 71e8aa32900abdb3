"""A run from configuration to results: one task, or a group's members one after another."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.config import ClassificationTask, RunConfig, TaskGroup
from lowrank_kit.data.sources import DatasetRef, Source, available, open_source
from lowrank_kit.data.task_rows import TaskRows
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.methods.base import Method
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_config, skeleton
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest
from lowrank_kit.runs.table import print_results
from lowrank_kit.runs.tracking import open_tracker
from lowrank_kit.stages import TaskStages

log = logging.getLogger(__name__)


def execute(config: RunConfig) -> Path:
    """Do everything that ``config`` asks for; return the run directory.

    What an earlier process finished in the same run directory is not done again (unless ``run.resume=false``).
    Raises `ConfigError` before any weight is loaded where configuration, shapes and data cannot go together.
    """
    source = open_source(config.data.source, config.data.root, config.data.revision)
    tasks = _tasks(config, source)
    device = _resolve_device(config.device)
    _check_method(config, tasks[0])
    with RunDirectory.open(config) as run, _logged_to(run.path / "log.txt"):
        if isinstance(config.task, TaskGroup):
            records = [r for task in tasks for r in _execute_member(config, task, source, device, run.path)]
            run.write_json("results.json", [asdict(record) for record in records])
        else:
            records = _execute_task(config, tasks[0], source, device, run)
        notes = sorted({f"{r.task}: {r.source}" for r in records})
        print_results(records, f"{_method(config).name} on {config.model.name}", notes)
    return run.path


def _tasks(config: RunConfig, source: Source) -> list[ClassificationTask]:
    """The tasks to run: of a group, those that the data source has."""
    task = config.task
    wanted = list(task.members.values()) if isinstance(task, TaskGroup) else [task]
    refs = {t.name: DatasetRef(t.name, t.hub_path, t.hub_name) for t in wanted}
    there = {ref.name for ref in available(source, refs.values())}
    if isinstance(task, TaskGroup) and there:
        if absent := [name for name in refs if name not in there]:
            log.warning(
                "data=%s has %s of the group %s and not %s; name a task alone to insist on it",
                config.data.source, ", ".join(sorted(there)), task.name, ", ".join(absent),
            )  # fmt: skip
        return [t for t in wanted if t.name in there]
    return wanted


def _check_method(config: RunConfig, task: ClassificationTask) -> None:
    """Let the method look at the model's shapes: no weight is read for this."""
    source = ModelSource(config.model.path, config.model.revision, config.model.gguf_file)
    layout = layout_of(skeleton(load_config(source), "classification", task.labels))
    _method(config).check(layout)


def _method(config: RunConfig) -> Method:
    if not isinstance(config.method, Method):
        raise ConfigError(
            f"method._target_ names {type(config.method).__qualname__}, which is no lowrank_kit.methods.base.Method"
        )
    return config.method


def _execute_member(
    config: RunConfig, task: ClassificationTask, source: Source, device: str, group: Path
) -> list[EvalRecord]:
    """Run one member of a group in a run directory of its own inside the group's."""
    tracker = config.tracker.model_copy(update={"group": config.tracker.group or group.name})
    settings = config.run.model_copy(update={"dir": str(group / task.name.rpartition("/")[2])})
    member = config.model_copy(update={"task": task, "tracker": tracker, "run": settings})
    with RunDirectory.open(member) as run, _logged_to(run.path / "log.txt"):
        return _execute_task(member, task, source, device, run)


def _execute_task(
    config: RunConfig, task: ClassificationTask, source: Source, device: str, run: RunDirectory
) -> list[EvalRecord]:
    todo = [stage for stage in config.run.stages if not run.done(stage)]
    earlier = _read_json(run.path / "manifest.json") if config.run.resume else None
    manifest = Manifest(config.seed, device, earlier)
    with manifest.watching(), ExitStack() as stack:
        tracker = open_tracker(config.tracker, run.path, config.resolved()) if todo else None
        if tracker:
            stack.push(lambda kind, error, trace: tracker.finish(0 if error is None else 1))
        rows = TaskRows(config, task, source)
        manifest.record("data", rows.facts())
        stages = TaskStages(config, task, rows, device, run, manifest, tracker)
        for stage in todo:
            log.info("%s: %s", task.name, stage)
            run.begin(stage)
            try:
                with manifest.stage(stage):
                    getattr(stages, stage)()
            finally:
                run.write_json("manifest.json", manifest.as_dict())
            run.mark(stage)
        if not todo:
            log.info("%s is complete already; run.resume=false starts over", run.path)
        records = [EvalRecord(**raw) for raw in _read_json(run.path / "results.json") or []]
        if tracker:
            tracker.summary({f"{r.task}/{r.metric}/{r.checkpoint}": r.value for r in records})
    return records


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: torch {torch.__version__} sees no CUDA device here; use device=cpu")
    return device


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Append what this package logs to ``file`` as well."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lowrank_kit")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
