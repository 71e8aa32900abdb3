"""What a model is evaluated on: labelled texts, running texts, benchmarks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowrank_kit.config.section import Section
from lowrank_kit.errors import did_you_mean

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
BenchmarkMetric = Literal[
    "acc",
    "acc_norm",
    "mcc",
    "f1",
    "em",
    "score",
    "strict_match",
    "flexible_match",
    "math_verify",
    "pass@1",
    "pass@10",
    "pass@100",
]


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
    label_names: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Names of the classes in the order of the rows' labels, by which a checkpoint with a trained head is matched;
    empty: not named."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """Metrics to report; the first one selects the best checkpoint."""
    train_split: str = "train"
    """Split to learn from."""
    eval_splits: tuple[str, ...] = Field(min_length=1)
    """Splits to report on."""

    @property
    def parts(self) -> tuple["ClassificationTask"]:
        """The task itself: a group has several."""
        return (self,)

    @property
    def teaches(self) -> bool:
        """Whether a method that trains has something to learn."""
        return True

    @model_validator(mode="after")
    def _every_class_has_a_name_or_none(self) -> "ClassificationTask":
        classes = self.labels if self.labels > 1 else 0
        if self.label_names and len(set(self.label_names)) != classes:
            raise ValueError(f"label_names are {list(self.label_names)}: give {classes} different ones, or none")
        return self

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

    @property
    def parts(self) -> tuple[ClassificationTask, ...]:
        """The members."""
        return tuple(self.members.values())


class TextSet(Section):
    """Running text: rows that are joined, tokenised as one and cut into windows. Its key is its name."""

    hub_path: str | None = None
    """Data set on the hub, for example `Salesforce/wikitext`; null: the hub does not have it."""
    hub_name: str | None = None
    """Configuration of that data set, for example `wikitext-2-raw-v1`."""
    hub_files: dict[str, str] = Field(default_factory=dict)
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
    def _evaluated_on_other_text_than_calibrated_on(self) -> "TextSet":
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
    """Split to evaluate on."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before every question."""
    shots_split: str | None = None
    """Split that the examples are drawn from; null: lm-eval's task has examples of its own."""
    metrics: tuple[BenchmarkMetric, ...] = Field(min_length=1)
    """Metrics to report; the first one is quoted and averaged. `acc_norm`: log-likelihoods per character; `em`: exact
    match of words; `strict_match`, `flexible_match`: lm-eval's exact match behind its filter of that name; `score`:
    LongBench's, whatever its task counts; `pass@k`: one of k programs passes its tests."""
    # Left out where they say nothing, so that what was measured before there were such benchmarks is found again.
    samples: int = Field(default=1, ge=1, exclude_if=lambda samples: samples == 1)
    """Programs written for every row, for pass@k."""
    temperature: float = Field(default=0.0, ge=0, exclude_if=lambda temperature: not temperature)
    """Of drawing the tokens of a text that is generated; 0: always the likeliest one."""
    max_new_tokens: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Longest text to generate, in tokens; null: what lm-eval's task says."""
    cut_middle: bool = Field(default=False, exclude_if=lambda cut: not cut)
    """Let a prompt that leaves no room for its answer lose its middle; false: it is an error."""
    max_rows: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Evaluate on the first so many rows; null: as many as `eval.limit`."""
    columns: dict[str, str] = Field(default_factory=dict)
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
    # Left out where they say nothing, so that older run directories are found again.
    lm_eval: str | None = Field(default=None, exclude_if=lambda task: task is None)
    """Multiple-choice task of lm-eval that asks the rows, for example `piqa`: its prompt and right choice are learnt
    just as they are evaluated. The columns above mean nothing then. null: the Alpaca prompt."""
    columns: dict[str, str] = Field(default_factory=dict, exclude_if=lambda columns: not columns)
    """Another name that the rows may have for a column which `lm_eval` reads."""
    only: dict[str, str] = Field(default_factory=dict, exclude_if=lambda only: not only)
    """Learn only from rows that have this text in this column, for example `{lang: python}`."""
    prompt: str | None = Field(default=None, exclude_if=lambda prompt: prompt is None)
    """What an instruction is asked in, for example `"Question: {instruction}\\nAnswer:"`; the answer follows directly.
    null: the Alpaca prompt."""
    learn_prompt: bool = Field(default=False, exclude_if=lambda learnt: not learnt)
    """Learn the prompt's tokens as well as the answer's."""
    max_characters: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Leave out rows whose instruction and answer, a space between them, have more characters; null: none."""
    fallback: bool = Field(default=False, exclude_if=lambda fallback: not fallback)
    """Of a task: learn from it only where the data source has none of the sets that are no fallback."""

    @model_validator(mode="after")
    def _choices_have_a_label(self) -> "InstructionSet":
        if (len(self.output_columns) > 1) != (self.label_column is not None):
            raise ValueError("several output_columns need a label_column that says which is right, one needs none")
        return self

    @model_validator(mode="after")
    def _a_prompt_asks(self) -> "InstructionSet":
        if self.prompt is not None and "{instruction}" not in self.prompt:
            raise ValueError("prompt has no {instruction}, the place of what is asked")
        if self.prompt is not None and self.input_column is not None:
            raise ValueError("a prompt of your own has no place for input_column: set it to null")
        return self

    @model_validator(mode="after")
    def _benchmarks_ask_in_their_own_words(self) -> "InstructionSet":
        if self.lm_eval is not None and (self.prompt is not None or self.learn_prompt or self.max_characters):
            raise ValueError("lm_eval decides what is asked and learnt: leave out prompt, learn_prompt, max_characters")
        return self


class CausalTask(Section):
    """What a causal language model is evaluated on, and what an adapter learns.

    Perplexity on `texts`, answers to `benchmarks`, or both. A method that trains learns `instructions`; a compressor
    calibrates on one of the `texts`.
    """

    kind: Literal["causal"]
    """Marks a task for causal language models."""
    name: str
    """Name in tables and in `task=`, for example `perplexity/wikitext2`."""
    texts: dict[str, TextSet] = Field(default_factory=dict)
    """The texts by name; add your own with `task.texts.NAME={}`, drop one with `~task.texts.NAME`."""
    # Left out of a run's configuration where they say nothing, so that older run directories are found again.
    perplexity: bool = Field(default=True, exclude_if=lambda measured: measured)
    """Measure perplexity on the texts; false: they only serve to calibrate on."""
    benchmarks: dict[str, Benchmark] = Field(default_factory=dict, exclude_if=lambda benchmarks: not benchmarks)
    """The benchmarks by name; drop one with `~task.benchmarks.NAME`."""
    instructions: dict[str, InstructionSet] = Field(default_factory=dict, exclude_if=lambda sets: not sets)
    """What an adapter learns, by name: of these sets, all that the data source has; drop one with
    `~task.instructions.NAME`. They are the calibration samples of a method that adapts, too."""
    max_length: int = Field(default=512, ge=2, exclude_if=lambda length: length == 512)
    """Longest instruction with its answer in tokens, cut off beyond it."""
    calibrate_on: str | None = None
    """Name of the text to calibrate on; null: the first one whose calibration split the data source has."""
    window: int | None = Field(default=None, ge=2)
    """Tokens per window, the first of which is never predicted; null: 2048, or what the model allows if less."""
    max_windows: int | None = Field(default=None, ge=1, exclude_if=lambda most: most is None)
    """Evaluate on the first so many windows of a text; null: as many as `eval.limit`."""
    batch_size: int = Field(default=1, ge=1)
    """Windows per forward pass; changes memory and speed, not the figure."""

    @property
    def parts(self) -> tuple["CausalTask"]:
        """The task itself: a group has several."""
        return (self,)

    @property
    def teaches(self) -> bool:
        """Whether a method that trains has something to learn."""
        return bool(self.instructions)

    @model_validator(mode="after")
    def _is_evaluated_on_something(self) -> "CausalTask":
        if not self.benchmarks and not (self.texts and self.perplexity):
            raise ValueError("there is nothing to evaluate on: neither benchmarks nor texts with perplexity=true")
        return self

    @model_validator(mode="after")
    def _calibrates_on_one_of_its_texts(self) -> "CausalTask":
        if self.calibrate_on is not None and self.calibrate_on not in self.texts:
            hint = did_you_mean(self.calibrate_on, self.texts)
            raise ValueError(f"calibrate_on='{self.calibrate_on}' is none of the texts{hint}")
        return self


SingleTask = ClassificationTask | CausalTask
"""What one run directory is about."""

Task = Annotated[ClassificationTask | CausalTask | TaskGroup, Field(discriminator="kind")]
