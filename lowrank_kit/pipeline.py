"""A run from configuration to results: one task, or a group's members one after another."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.base import Adapter, FineTuning
from lowrank_kit.cache.entry import limit_bytes
from lowrank_kit.compressors.base import Compressor
from lowrank_kit.config import CausalTask, ClassificationTask, RunConfig, SingleTask, TaskGroup
from lowrank_kit.data.labels import check_labels
from lowrank_kit.data.sources import Source, has, open_source
from lowrank_kit.data.task_rows import TaskRows, dataset_of, needed_splits
from lowrank_kit.data.texts import TaskTexts
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.records import EvalRecord, read_records
from lowrank_kit.files import read_json
from lowrank_kit.method import Method
from lowrank_kit.models.contents import contents
from lowrank_kit.models.layout import ModelLayout, layout_of
from lowrank_kit.models.load import ModelSource, check_files, load_config, skeleton, streamable_folder
from lowrank_kit.models.quantised import as_quantised, check_quantisation
from lowrank_kit.runs.directory import RunDirectory, run_path
from lowrank_kit.runs.inputs import Inputs, inputs_of
from lowrank_kit.runs.manifest import Manifest
from lowrank_kit.runs.published import published_for
from lowrank_kit.runs.table import print_results
from lowrank_kit.runs.tracking import NullTracker, open_tracker
from lowrank_kit.stages.base import Stages, tokenizer_of
from lowrank_kit.stages.classification import ClassificationStages
from lowrank_kit.stages.instructions import InstructionStages
from lowrank_kit.stages.perplexity import PerplexityStages
from lowrank_kit.training.processes import rows_per_pass

log = logging.getLogger(__name__)


def execute(config: RunConfig) -> Path:
    """Do everything that ``config`` asks for; return the run directory.

    What an earlier process finished in the same run directory is not done again (unless ``run.resume=false``).
    Raises `ConfigError` before a run directory is made or any weight is loaded where configuration, shapes and
    data cannot go together.
    """
    device = _resolve_device(config.device)
    _check_machine(config, device)
    if device == "cpu" and config.dtype == "float16":
        log.warning("dtype=float16 on a CPU is slow, and its sums overflow above 65504: use dtype=float32 or bfloat16")
    limit_bytes()
    source = open_source(config.data.source, config.data.root, config.data.revision)
    tasks = _tasks(config, source)
    model = _check_method(config, tasks)
    found = [_open_data(config, task, source, model) for task in tasks]
    facts = {
        f"{task.name}/{split}": fact
        for task, data in zip(tasks, found, strict=True)
        for split, fact in data.facts().items()
    }
    if not run_path(config).is_dir():
        _check_lengths(config, found)
    with (
        distributed.together(device),
        RunDirectory.open(config, lambda: _inputs(config, facts)) as run,
        _logged_to(run.path / "log.txt"),
    ):
        log.info(
            "%s on %s (%s), %s, %s", _method(config).name, config.model.name, config.model.path, config.dtype, device
        )
        if distributed.size() > 1:
            log.info("%d processes, %s", distributed.size(), config.runtime.kind)
        if isinstance(config.task, TaskGroup):
            records = []
            for number, (task, its_data) in enumerate(zip(tasks, found, strict=True), start=1):
                log.info("%s (%d of %d)", task.name, number, len(tasks))
                records += _execute_member(config, task, its_data, device, run.path)
            run.write_json("results.json", [asdict(record) for record in records])
        else:
            records = _execute_task(config, tasks[0], found[0], device, run)
        if records and launcher.is_main():
            notes = sorted({f"{r.task}: {r.source}" for r in records})
            title = f"{_method(config).name} on {config.model.name}"
            print_results(records, title, notes, published_for(config))
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


def _check_lengths(config: RunConfig, found: Sequence[TaskRows | TaskTexts]) -> None:
    """Raise `ConfigError` for texts that are too short and windows that are too long; needs the tokenizer alone."""
    tokenizer = tokenizer_of(ModelSource(config.model.path, config.model.revision, config.model.gguf_file))
    for data in found:
        if isinstance(data, TaskTexts):
            data.evaluation(tokenizer)
            if isinstance(config.method, Compressor):
                data.calibration(tokenizer)


def _open_data(config: RunConfig, task: SingleTask, source: Source, model: PretrainedConfig) -> TaskRows | TaskTexts:
    if isinstance(task, ClassificationTask):
        return TaskRows(config, task, source, model)
    learns = isinstance(config.method, FineTuning) or config.recovery.learns_the_task
    return TaskTexts(config, task, source, learns, model)


def _check_method(config: RunConfig, tasks: Sequence[SingleTask]) -> PretrainedConfig:
    """Let the method look at the tasks and at the model's shapes: no weight is read for this.

    Returns the model's configuration.
    """
    method, task = _method(config), tasks[0]
    if isinstance(method, FineTuning) and isinstance(task, CausalTask) and not task.instructions:
        raise ConfigError(
            f"method={method.name} is trained, and task={task.name} has nothing to learn from (task.instructions): "
            "choose a task that has, such as commonsense, math, code or glue/sst2, or a method that compresses, or "
            "method=none"
        )
    _check_recovery(config, task)
    if isinstance(method, Compressor) and not isinstance(task, CausalTask):
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
        if isinstance(task, CausalTask):
            layout = layout_of(skeleton(model_config, "causal"))
        else:
            layout = layout_of(skeleton(model_config, "classification", task.labels))
    except LowRankKitError as error:
        raise ConfigError(str(error)) from error
    check_files(source)
    for each in tasks:
        if isinstance(each, ClassificationTask):
            check_labels(model_config, each)
    if config.model.quantization != "none":
        layout = as_quantised(layout)
    method.check(layout)
    if isinstance(recovering := config.recovery.method, Adapter):
        recovering.check(layout)
    if isinstance(method, Compressor):
        method.check_tokens(layout, config.calibration.samples * config.calibration.seq_len)
    if config.runtime.weights == "streamed":
        _check_streamed(config, layout, source)
    return model_config


def _check_streamed(config: RunConfig, layout: ModelLayout, source: ModelSource) -> None:
    """Raise `ConfigError` for what needs the whole model in memory."""
    method = _method(config)
    if not isinstance(method, Compressor):
        raise ConfigError(f"runtime.weights=streamed is for compression, and method={method.name} compresses nothing")
    method.check_streamed()
    if any(ref.expert is not None for ref in layout.linears):
        raise ConfigError(f"this {layout.model_type} has experts, which are not streamed: use runtime.weights=resident")
    if config.recovery.what != "none":
        raise ConfigError("recovery trains the whole model: use runtime.weights=resident, or recovery=none")
    streamable_folder(source)


def _check_recovery(config: RunConfig, task: SingleTask) -> None:
    method, recovery = _method(config), config.recovery
    if recovery.what == "none":
        return
    if not isinstance(method, Compressor):
        raise ConfigError(
            f"recovery.what={recovery.what} trains what a compression left, and method={method.name} compresses "
            "nothing: choose a method that does, or recovery=none"
        )
    if recovery.what == "factors" and isinstance(method, Compressor) and not method.factorises:
        raise ConfigError(
            f"recovery.what=factors trains low-rank factors, and method={method.name} leaves none: use recovery=lora"
        )
    if recovery.method is not None and not isinstance(recovery.method, Adapter):
        raise ConfigError(
            f"recovery.method={getattr(recovery.method, 'name', '')} is no adapter: choose one, for example "
            "recovery.method=astra or recovery.method=lora"
        )
    if recovery.data == "task" and isinstance(task, CausalTask) and not task.instructions:
        raise ConfigError(
            f"recovery.data=task: task={task.name} has nothing to learn from (task.instructions): choose a task that "
            f"has, such as commonsense, or recovery.data=text, or one of {', '.join(recovery.sets)}"
        )


def _method(config: RunConfig) -> Method:
    if not isinstance(config.method, Method):
        raise ConfigError(
            f"method._target_ names {type(config.method).__qualname__}, which is no lowrank_kit.method.Method"
        )
    return config.method


def _execute_member(
    config: RunConfig, task: SingleTask, data: TaskRows | TaskTexts, device: str, group: Path
) -> list[EvalRecord]:
    """Run one member of a group in a run directory of its own inside the group's."""
    tracker = config.tracker.model_copy(update={"group": config.tracker.group or group.name})
    settings = config.run.model_copy(update={"dir": str(group / task.name.rpartition("/")[2])})
    member = config.model_copy(update={"task": task, "tracker": tracker, "run": settings})
    with RunDirectory.open(member, lambda: _inputs(config, data.facts())) as run, _logged_to(run.path / "log.txt"):
        return _execute_task(member, task, data, device, run)


def _execute_task(
    config: RunConfig, task: SingleTask, data: TaskRows | TaskTexts, device: str, run: RunDirectory
) -> list[EvalRecord]:
    todo = [stage for stage in config.run.stages if not run.done(stage)]
    manifest = Manifest(config.seed, device, read_json(run.path / "manifest.json", dict))
    manifest.record("data", data.facts())
    manifest.record("runtime", {"kind": config.runtime.kind, "processes": distributed.size()})
    with manifest.watching(), ExitStack() as stack:
        # A run that was killed after its last stage owes the tracker how it ended.
        tracked = launcher.is_main() and (todo or not run.was_complete)
        tracker = open_tracker(config.tracker, run.path, config.resolved()) if tracked else NullTracker()
        stack.push(lambda kind, error, trace: tracker.finish(0 if error is None else 1))
        stages = _stages_of(config, task)(config, task, data, device, run, manifest, tracker)
        if todo:
            _log_data(data)
        else:
            log.info("%s is complete already; run.resume=false starts over", run.path)
        for stage in todo:
            run.begin(stage)
            try:
                with manifest.stage(stage):
                    work = getattr(stages, stage)
                    work() if stage in stages.shared else distributed.on_main(work)
            finally:
                manifest.record("data", data.facts())
                run.write_json("manifest.json", manifest.as_dict())
            run.mark(stage)
            log.info("%s: %s, %.1f s", task.name, stage, manifest.seconds(stage))
        records = read_records(run.path / "results.json")
        tracker.summary({f"{r.task}/{r.metric}/{r.checkpoint}": r.value for r in records})
    return records


def _stages_of(config: RunConfig, task: SingleTask) -> Callable[..., Stages[Any, Any]]:
    if isinstance(task, ClassificationTask):
        return ClassificationStages
    return InstructionStages if isinstance(config.method, FineTuning) else PerplexityStages


def _log_data(data: TaskRows | TaskTexts) -> None:
    facts = data.facts()
    for split, fact in facts.items():
        log.info("%s: %d rows, %s", split, fact["rows"], fact["source"])
    for note in sorted({fact["note"] for fact in facts.values()} - {""}):
        log.info("%s", note)


def _inputs(config: RunConfig, facts: Mapping[str, Any]) -> Inputs:
    return inputs_of(facts, contents(ModelSource(config.model.path, config.model.revision, config.model.gguf_file)))


def _resolve_device(device: str) -> str:
    there = torch.cuda.device_count()
    if launcher.started() > 1 and device in ("auto", "cuda") and there:
        device = f"cuda:{launcher.local_number()}"
    if device == "auto":
        return "cuda" if there else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= there:
        raise ConfigError(f"device={device}: torch {torch.__version__} sees {there} CUDA devices here; use device=auto")
    return device


def _check_machine(config: RunConfig, device: str) -> None:
    """Raise `ConfigError` for processes, devices or packages that do not go with the configuration."""
    processes = launcher.started()
    if unmet := config.runtime.unmet(processes, launcher.launched()):
        raise ConfigError(unmet)
    if processes > 1 and config.device.startswith("cuda:"):
        raise ConfigError(f"device={config.device} is one device, for {processes} processes: use device=auto")
    if isinstance(config.method, FineTuning) or config.recovery.what != "none":
        rows_per_pass(config.train, processes)
        if config.train.mixed_precision == "fp16" and not device.startswith("cuda"):
            raise ConfigError(
                f"train.mixed_precision=fp16 needs a CUDA device, not {device}: use train.mixed_precision=none, or bf16"
            )
        if config.runtime.placement is not None:
            raise ConfigError(
                "runtime=spread is for models that are judged: train with another, and judge what was exported with "
                "method=none model.path=FOLDER runtime=spread"
            )
    if config.runtime.kind in ("fsdp", "deepspeed") and config.recovery.what != "none":
        raise ConfigError("recovery trains a model that every process holds whole: use runtime=ddp or runtime=single")
    if config.model.quantization != "none":
        if isinstance(config.method, Compressor):
            raise ConfigError(f"method={config.method.name} compresses float weights: use model.quantization=none")
        check_quantisation(config.model.quantization, device)


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Append what this package logs to ``file`` as well; of several processes, the first does."""
    if not launcher.is_main():
        yield
        return
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
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
        handler.close()
