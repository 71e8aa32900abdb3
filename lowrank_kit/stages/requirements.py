"""Whether the parts of a configuration go together. Each part is asked, before a weight is read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from lowrank_kit import launcher
from lowrank_kit.config import RunConfig, SingleTask
from lowrank_kit.data.labels import check_labels
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.speed import check_positions
from lowrank_kit.models.layout import ModelLayout, layout_of
from lowrank_kit.models.load import ModelSource, check_files, load_config, skeleton, streamable_folder
from lowrank_kit.models.memory import free_bytes
from lowrank_kit.models.quantised import as_quantised, check_quantisation
from lowrank_kit.stages.models import source_of
from lowrank_kit.training.processes import rows_per_pass


def device_for(asked: str) -> str:
    """The device of this process: what `device` asks for, its own number where there are several processes.

    Raises `ConfigError` for a CUDA device that is not there.
    """
    there = torch.cuda.device_count()
    if launcher.started() > 1 and asked in ("auto", "cuda") and there:
        asked = f"cuda:{launcher.local_number()}"
    if asked == "auto":
        return "cuda" if there else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda" and int(index or 0) >= there:
        built = "" if torch.version.cuda else " and is built for CPUs alone: install one for CUDA, or"
        raise ConfigError(
            f"device={asked}: torch {torch.__version__} sees {there} CUDA devices here{built or ';'} use device=auto"
        )
    return asked


def check_settings(config: RunConfig, task: SingleTask, device: str) -> None:
    """Raise `ConfigError` with all that the method, the recovery, the task and the machine do not have of each other.

    Reads settings alone.
    """
    method, runtime, recovery = config.method, config.runtime, config.recovery
    _refuse(_of_machine(config, device))
    _refuse(method.requirements(config.model, runtime, task))
    if config.calibration.on == "text" and task.kind != "causal":
        raise ConfigError(f"calibration.on=text: task={task.name} has no texts; leave it at task")
    _refuse(recovery.requirements(method, runtime, task))
    if method.trains or recovery.trains:
        rows_per_pass(config.train, launcher.started())
    if config.model.quantization != "none":
        check_quantisation(config.model.quantization, device)


def check_model(config: RunConfig, tasks: Sequence[SingleTask]) -> None:
    """Let the method see the shapes of the model; no weight is read for this.

    Raises `ConfigError` for a model that is none, that has no such head or other classes than a task, or on which the
    method's settings cannot be met.
    """
    source, method, calibration = source_of(config.model), config.method, config.calibration
    model = _configuration(source)
    layout = _layout(model, tasks[0])
    check_files(source)
    for task in tasks:
        if task.kind == "classification":
            check_labels(model, task)
    if config.model.quantization != "none":
        layout = as_quantised(layout)
    layout = replace(layout, itemsize=getattr(torch, config.dtype).itemsize)
    method.check(layout)
    if config.recovery.method is not None:
        config.recovery.method.check(layout)
    method.check_tokens(layout, calibration.samples * calibration.seq_len)
    if config.eval.speed.enabled:
        check_positions(config.eval.speed, model)
    if config.runtime.weights == "streamed":
        method.check_streamed()
        _check_streamable(layout, source)


def check_memory(config: RunConfig, task: SingleTask, device: str) -> None:
    """Raise `ConfigError` where the weights alone find no room on a CUDA device. Reads shapes, no weights.

    What is streamed, spread or quantised takes less, which is not estimated.
    """
    runtime = config.runtime
    less = runtime.weights == "streamed" or runtime.placement is not None or config.model.quantization != "none"
    if less or not device.startswith("cuda"):
        return
    labels = task.labels if task.kind == "classification" else None
    shapes = skeleton(_configuration(source_of(config.model)), task.kind, labels)
    needed = sum(weight.numel() for weight in shapes.parameters()) * getattr(torch, config.dtype).itemsize
    if needed <= (free := free_bytes(torch.device(device))):
        return
    smaller = ["dtype=bfloat16"] if config.dtype == "float32" else []
    if config.method.trains:
        smaller.append("model.quantization=nf4 (for adapters that leave the base alone)")
    elif config.method.compresses:
        smaller.append("runtime=streamed with run.stages=[calibrate,plan,apply] (for the SVD family)")
    else:
        smaller.append("runtime=spread")
    raise ConfigError(
        f"the weights of {config.model.name} take {needed / 2**30:.1f} GiB in {config.dtype}, and "
        f"{free / 2**30:.1f} GiB are free on {device}: use {', '.join(smaller)} or device=cpu"
    )


def _check_streamable(layout: ModelLayout, source: ModelSource) -> None:
    """Raise `ConfigError` for a model that cannot be read a block at a time."""
    if any(ref.expert is not None for ref in layout.linears):
        raise ConfigError(f"this {layout.model_type} has experts, which are not streamed: use runtime.weights=resident")
    streamable_folder(source)


def _of_machine(config: RunConfig, device: str) -> Iterator[str]:
    processes, runtime = launcher.started(), config.runtime
    if unmet := runtime.unmet(processes, launcher.launched()):
        yield unmet
    elif processes > 1 and config.device.startswith("cuda:"):
        yield f"device={config.device} is one device, for {processes} processes: use device=auto"
    trains = config.method.trains or config.recovery.trains
    if trains and config.train.mixed_precision == "fp16" and not device.startswith("cuda"):
        yield f"train.mixed_precision=fp16 needs a CUDA device, not {device}: use train.mixed_precision=none, or bf16"


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ConfigError("\n".join(found))


def _configuration(source: ModelSource) -> PretrainedConfig:
    try:
        return load_config(source)
    except LowRankKitError as error:
        # Of a type that transformers does not know; a hub that cannot be reached is no fault of the configuration.
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error)) from error
        raise


def _layout(model: PretrainedConfig, task: SingleTask) -> ModelLayout:
    labels = task.labels if task.kind == "classification" else None
    try:
        return layout_of(skeleton(model, task.kind, labels))
    except LowRankKitError as error:
        raise ConfigError(str(error)) from error
