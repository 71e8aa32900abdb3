"""A run from configuration to results: one task, or a group's members one after another."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.config import ClassificationTask, PerplexityTask, RunConfig, TaskGroup
from lowrank_kit.data.sources import Source, has, open_source
from lowrank_kit.data.task_rows import TaskRows, dataset_of, needed_splits
from lowrank_kit.data.texts import TaskTexts
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.methods.base import Adapter, Compressor, Method
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_config, skeleton
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest
from lowrank_kit.runs.table import print_results
from lowrank_kit.runs.tracking import NullTracker, open_tracker
from lowrank_kit.stages.base import Stages
from lowrank_kit.stages.classification import ClassificationStages
from lowrank_kit.stages.perplexity import PerplexityStages

log = logging.getLogger(__name__)

SingleTask = ClassificationTask | PerplexityTask


def execute(config: RunConfig) -> Path:
    """Do everything that ``config`` asks for; return the run directory.

    What an earlier process finished in the same run directory is not done again (unless ``run.resume=false``).
    Raises `ConfigError` before a run directory is made or any weight is loaded where configuration, shapes and
    data cannot go together.
    """
    source = open_source(config.data.source, config.data.root, config.data.revision)
    device = _resolve_device(config.device)
    tasks = _tasks(config, source)
    _check_method(config, tasks[0])
    found = [_open_data(config, task, source) for task in tasks]
    with RunDirectory.open(config) as run, _logged_to(run.path / "log.txt"):
        log.info(
            "%s on %s (%s), %s, %s", _method(config).name, config.model.name, config.model.path, config.dtype, device
        )
        if isinstance(config.task, TaskGroup):
            records = []
            for number, (task, its_data) in enumerate(zip(tasks, found, strict=True), start=1):
                log.info("%s (%d of %d)", task.name, number, len(tasks))
                records += _execute_member(config, task, its_data, device, run.path)
            run.write_json("results.json", [asdict(record) for record in records])
        else:
            records = _execute_task(config, tasks[0], found[0], device, run)
        if records:
            notes = sorted({f"{r.task}: {r.source}" for r in records})
            print_results(records, f"{_method(config).name} on {config.model.name}", notes)
    return run.path


def _tasks(config: RunConfig, source: Source) -> Sequence[SingleTask]:
    """The tasks to run: of a group, those that the data source has."""
    task = config.task
    if not isinstance(task, TaskGroup):
        return [task]
    wanted = list(task.members.values())
    there = [t for t in wanted if has(source, dataset_of(t), needed_splits(config, t))]
    absent = [t.name for t in wanted if t not in there]
    if there and absent:
        log.warning(
            "data=%s has %s of the group %s and not %s; name a task alone to insist on it",
            config.data.source, ", ".join(t.name for t in there), task.name, ", ".join(absent),
        )  # fmt: skip
    return there or wanted


def _open_data(config: RunConfig, task: SingleTask, source: Source) -> TaskRows | TaskTexts:
    return TaskTexts(config, task, source) if isinstance(task, PerplexityTask) else TaskRows(config, task, source)


def _check_method(config: RunConfig, task: SingleTask) -> None:
    """Let the method look at the task and at the model's shapes: no weight is read for this."""
    method = _method(config)
    if isinstance(method, Adapter) and isinstance(task, PerplexityTask):
        raise ConfigError(
            f"method={method.name} is trained on labelled rows, which task={task.name} does not have: choose a task "
            "such as glue/sst2, or a method that compresses, or method=none"
        )
    if config.recovery.what != "none" and not isinstance(method, Compressor):
        raise ConfigError(
            f"recovery.what={config.recovery.what} trains what a compression left, and method={method.name} compresses "
            "nothing: choose a method that does, or recovery=none"
        )
    if config.recovery.what == "factors" and isinstance(method, Compressor) and not method.factorises:
        raise ConfigError(
            f"recovery.what=factors trains low-rank factors, and method={method.name} leaves none: use recovery=lora"
        )
    if isinstance(method, Compressor) and not isinstance(task, PerplexityTask):
        raise ConfigError(
            f"method={method.name} compresses causal language models, and task={task.name} judges classifiers: "
            "choose task=perplexity, or a method that adapts"
        )
    source = ModelSource(config.model.path, config.model.revision, config.model.gguf_file)
    try:
        model_config = load_config(source)
    except LowRankKitError as error:
        # Of a type that transformers does not know; a hub that cannot be reached is no fault of the configuration.
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error)) from error
        raise
    try:
        if isinstance(task, PerplexityTask):
            layout = layout_of(skeleton(model_config, "causal"))
        else:
            layout = layout_of(skeleton(model_config, "classification", task.labels))
    except LowRankKitError as error:
        raise ConfigError(str(error)) from error
    method.check(layout)
    if isinstance(method, Compressor):
        method.check_tokens(layout, config.calibration.samples * config.calibration.seq_len)


def _method(config: RunConfig) -> Method:
    if not isinstance(config.method, Method):
        raise ConfigError(
            f"method._target_ names {type(config.method).__qualname__}, which is no lowrank_kit.methods.base.Method"
        )
    return config.method


def _execute_member(
    config: RunConfig, task: SingleTask, data: TaskRows | TaskTexts, device: str, group: Path
) -> list[EvalRecord]:
    """Run one member of a group in a run directory of its own inside the group's."""
    tracker = config.tracker.model_copy(update={"group": config.tracker.group or group.name})
    settings = config.run.model_copy(update={"dir": str(group / task.name.rpartition("/")[2])})
    member = config.model_copy(update={"task": task, "tracker": tracker, "run": settings})
    with RunDirectory.open(member) as run, _logged_to(run.path / "log.txt"):
        return _execute_task(member, task, data, device, run)


def _execute_task(
    config: RunConfig, task: SingleTask, data: TaskRows | TaskTexts, device: str, run: RunDirectory
) -> list[EvalRecord]:
    todo = [stage for stage in config.run.stages if not run.done(stage)]
    manifest = Manifest(config.seed, device, _read_json(run.path / "manifest.json"))
    manifest.record("data", data.facts())
    with manifest.watching(), ExitStack() as stack:
        tracker = open_tracker(config.tracker, run.path, config.resolved()) if todo else NullTracker()
        stack.push(lambda kind, error, trace: tracker.finish(0 if error is None else 1))
        kind: Any = PerplexityStages if isinstance(task, PerplexityTask) else ClassificationStages
        stages: Stages[Any, Any] = kind(config, task, data, device, run, manifest, tracker)
        if todo:
            _log_data(data)
        else:
            log.info("%s is complete already; run.resume=false starts over", run.path)
        for stage in todo:
            run.begin(stage)
            try:
                with manifest.stage(stage):
                    getattr(stages, stage)()
            finally:
                manifest.record("data", data.facts())
                run.write_json("manifest.json", manifest.as_dict())
            run.mark(stage)
            log.info("%s: %s, %.1f s", task.name, stage, manifest.seconds(stage))
        records = [EvalRecord(**raw) for raw in _read_json(run.path / "results.json") or []]
        tracker.summary({f"{r.task}/{r.metric}/{r.checkpoint}": r.value for r in records})
    return records


def _log_data(data: TaskRows | TaskTexts) -> None:
    facts = data.facts()
    for split, fact in facts.items():
        log.info("%s: %d rows, %s", split, fact["rows"], fact["source"])
    for note in sorted({fact["note"] for fact in facts.values()} - {""}):
        log.info("%s", note)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _resolve_device(device: str) -> str:
    there = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if there else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= there:
        raise ConfigError(f"device={device}: torch {torch.__version__} sees {there} CUDA devices here; use device=auto")
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
