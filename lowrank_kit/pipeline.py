"""A run from configuration to results: one task, or a group's members one after another."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lowrank_kit import distributed, launcher
from lowrank_kit.assets import cache_dir
from lowrank_kit.cache.entry import limit_bytes
from lowrank_kit.config import RunConfig, SingleTask
from lowrank_kit.data.causal import CausalData
from lowrank_kit.data.recovery_rows import RecoveryRows
from lowrank_kit.data.sources import Source, has, open_source
from lowrank_kit.data.task_instructions import TaskInstructions
from lowrank_kit.data.task_rows import TaskRows, dataset_of, needed_splits
from lowrank_kit.data.task_texts import TaskTexts
from lowrank_kit.errors import machine_errors
from lowrank_kit.evaluation.records import EvalRecord, read_records
from lowrank_kit.files import read_json
from lowrank_kit.models.contents import contents
from lowrank_kit.runs.directory import RunDirectory, run_path
from lowrank_kit.runs.inputs import Inputs, inputs_of
from lowrank_kit.runs.manifest import Manifest
from lowrank_kit.runs.published import published_for
from lowrank_kit.runs.summary import print_results
from lowrank_kit.runs.tracking import NullTracker, open_tracker
from lowrank_kit.stages.causal_fine_tuning import CausalFineTuningStages
from lowrank_kit.stages.classification import ClassificationStages
from lowrank_kit.stages.compression import CompressionStages
from lowrank_kit.stages.ledger import Ledger
from lowrank_kit.stages.models import Models, source_of
from lowrank_kit.stages.requirements import check_memory, check_model, check_settings, device_for
from lowrank_kit.stages.workplace import Workplace

log = logging.getLogger(__name__)


class Stages(Protocol):
    """One task's run."""

    def run(self, ledger: Ledger) -> None:
        """Do the stages that are to be done."""
        ...


# By the kind of task, and whether the method trains.
STAGES: Mapping[tuple[str, bool], Callable[..., Stages]] = {
    ("classification", True): ClassificationStages,
    ("classification", False): ClassificationStages,
    ("causal", True): CausalFineTuningStages,
    ("causal", False): CompressionStages,
}


@dataclass(frozen=True)
class Member:
    """A task with its data, loaded and checked."""

    task: SingleTask
    data: TaskRows | CausalData


@machine_errors()
def execute(config: RunConfig) -> Path:
    """Do everything that ``config`` asks for; return the run directory.

    What an earlier process finished in the same run directory is not done again (unless ``run.resume=false``).
    Raises `ConfigError` before a run directory is made or any weight is loaded where configuration, shapes and
    data cannot go together, and `LowRankKitError` for what the machine refuses in the middle, such as room on the disk.
    """
    device = device_for(config.device)
    check_settings(config, config.task.parts[0], device)
    if device == "cpu" and config.dtype == "float16":
        log.warning("dtype=float16 on a CPU is slow, and its sums overflow above 65504: use dtype=float32 or bfloat16")
    limit_bytes()
    models = Models(config.model, getattr(torch, config.dtype), device, config.seed, config.runtime.placement)
    source = open_source(config.data.source, config.data.root, config.data.revision)
    tasks = _present(config, source)
    check_model(config, tasks)
    check_memory(config, tasks[0], device)
    members = [_open(config, task, source) for task in tasks]
    facts = {f"{member.task.name}/{split}": fact for member in members for split, fact in member.data.facts().items()}
    if not run_path(config).is_dir():
        for member in members:
            member.data.check_lengths(models.reader, config.method)
    with (
        distributed.together(device),
        RunDirectory.open(config, lambda: _inputs(config, facts)) as run,
        _logged_to(run.path / "log.txt"),
        _interruption_told(run.path),
    ):
        log.info(
            "%s on %s (%s), %s, %s", config.method.name, config.model.name, config.model.path, config.dtype, device
        )
        if distributed.size() > 1:
            log.info("%d processes, %s", distributed.size(), config.runtime.kind)
        if config.task.kind == "group":
            records = []
            for number, member in enumerate(members, start=1):
                log.info("%s (%d of %d)", member.task.name, number, len(members))
                records += _execute_member(config, member, models, run.path)
            run.write_json("results.json", [asdict(record) for record in records])
        else:
            records = _execute_task(config, members[0], models, run)
        if records and launcher.is_main():
            notes = sorted({f"{r.task}: {r.source}" for r in records})
            title = f"{config.method.name} on {config.model.name}"
            print_results(records, title, notes, published_for(config))
    return run.path


def _present(config: RunConfig, source: Source) -> Sequence[SingleTask]:
    """The tasks to run: of a group, those that the data source has."""
    task = config.task
    if task.kind != "group":
        return task.parts
    there = [t for t in task.parts if has(source, dataset_of(t), needed_splits(config.eval, t))]
    absent = [t.name for t in task.parts if t not in there]
    if there and absent:
        log.warning(
            "data=%s has %s of the group %s and not %s; name a task alone to insist on it",
            config.data.source, ", ".join(t.name for t in there), task.name, ", ".join(absent),
        )  # fmt: skip
    return there or task.parts


def _open(config: RunConfig, task: SingleTask, source: Source) -> Member:
    settings, calibration, recovery = config.eval, config.calibration, config.recovery
    seed, train_samples = config.seed, config.train.train_samples
    if task.kind == "classification":
        rows = TaskRows(task, source, settings, calibration, seed=seed, train_samples=train_samples)
        return Member(task, rows)
    instructions = None
    if config.method.trains or recovery.learns_the_task:
        instructions = TaskInstructions(task, source, settings, seed=seed, train_samples=train_samples)
    texts = TaskTexts(task, source, settings, calibration, instructions)
    if not recovery.trains:
        return Member(task, CausalData(texts))
    return Member(
        task, CausalData(texts, RecoveryRows(recovery, texts, source, seed=seed, train_samples=train_samples))
    )


def _execute_member(config: RunConfig, member: Member, models: Models, group: Path) -> list[EvalRecord]:
    """Run one member of a group in a run directory of its own inside the group's."""
    tracker = config.tracker.model_copy(update={"group": config.tracker.group or group.name})
    settings = config.run.model_copy(update={"dir": str(group / member.task.name.rpartition("/")[2])})
    its_config = config.model_copy(update={"task": member.task, "tracker": tracker, "run": settings})
    facts = member.data.facts()
    with RunDirectory.open(its_config, lambda: _inputs(config, facts)) as run, _logged_to(run.path / "log.txt"):
        return _execute_task(its_config, member, models, run)


def _execute_task(config: RunConfig, member: Member, models: Models, run: RunDirectory) -> list[EvalRecord]:
    todo = [stage for stage in config.run.stages if not run.done(stage)]
    manifest = Manifest(config.seed, models.device, read_json(run.path / "manifest.json", dict))
    manifest.record("data", member.data.facts())
    manifest.record("runtime", {"kind": config.runtime.kind, "processes": distributed.size()})
    with manifest.watching(), ExitStack() as stack:
        # A run that was killed after its last stage owes the tracker how it ended.
        tracked = launcher.is_main() and (todo or not run.was_complete)
        tracker = open_tracker(config.tracker, run.path, config.resolved()) if tracked else NullTracker()
        stack.push(lambda kind, error, trace: tracker.finish(0 if error is None else 1))
        if todo:
            _log_data(member.data.facts())
        else:
            log.info("%s is complete already; run.resume=false starts over", run.path)
        place = Workplace(run, manifest, tracker, cache_dir() if config.calibration.cache else None)
        stages = STAGES[member.task.kind, config.method.trains](config, member.task, member.data, models, place)
        stages.run(Ledger(member.task.name, run, manifest, todo, member.data.facts))
        records = read_records(run.path / "results.json")
        tracker.summary({f"{r.task}/{r.metric}/{r.checkpoint}": r.value for r in records})
    return records


@contextmanager
def _interruption_told(path: Path) -> Iterator[None]:
    """One line for a person who ends the run by Ctrl-C, or reads why a scheduler's job ended."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.warning("interrupted; the same command again goes on in %s", path)
        raise


def _log_data(facts: Mapping[str, Any]) -> None:
    for split, fact in facts.items():
        log.info("%s: %d rows, %s", split, fact["rows"], fact["source"])
    for note in sorted({fact["note"] for fact in facts.values()} - {""}):
        log.info("%s", note)


def _inputs(config: RunConfig, facts: Mapping[str, Any]) -> Inputs:
    return inputs_of(facts, contents(source_of(config.model)))


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Append what this package logs to ``file`` as well; of several processes, the first does."""
    if not launcher.is_main():
        yield
        return
    try:
        handler = _LogFile(file, encoding="utf-8")
    except OSError:
        # Of a finished run that is only shown.
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lowrank_kit")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _LogFile(logging.FileHandler):
    """Of a line that finds no room on the disk it says nothing: the run itself tells of that soon enough."""

    def handleError(self, record: logging.LogRecord) -> None:
        """As any handler, for what is no fault of the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
