"""Fine-tuning, and recovery behind a compression."""

from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from lowrank_kit.config.section import Section
from lowrank_kit.errors import did_you_mean


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
    # Left out where they say nothing, so that older run directories are found again.
    lm_eval: str | None = Field(default=None, exclude_if=lambda task: task is None)
    """Multiple-choice task of lm-eval that asks the rows, for example `piqa`: its prompt and right choice are learnt
    just as they are evaluated. The columns above mean nothing then. null: the Alpaca prompt."""
    columns: dict[str, str] = Field(default_factory=dict, exclude_if=lambda columns: not columns)
    """Another name that the rows may have for a column which `lm_eval` reads."""
    only: dict[str, str] = Field(default_factory=dict, exclude_if=lambda only: not only)
    """Learn only from rows that have this text in this column, for example `{lang: python}`."""
    fallback: bool = Field(default=False, exclude_if=lambda fallback: not fallback)
    """Of a task: learn from it only where the data source has none of the sets that are no fallback."""

    @model_validator(mode="after")
    def _choices_have_a_label(self) -> "InstructionSet":
        if (len(self.output_columns) > 1) != (self.label_column is not None):
            raise ValueError("several output_columns need a label_column that says which is right, one needs none")
        return self


NO_SETS = ("text", "task")
"""What `recovery.data` may name beside the sets of its own."""


class RecoveryConfig(Section):
    """Training behind the compression; the schedule is `train`."""

    what: Literal["none", "factors", "lora", "adapter"] = "none"
    """What learns: nothing; of the replaced blocks alone, the low-rank factors and norms, or LoRA that is merged
    afterwards; or the adapter of `method`, in every linear that it names. The replaced blocks are those with a factored
    linear; of a model without any (blocks dropped, merged or pruned), for LoRA, all of them."""
    method: SerializeAsAny[Section] | None = Field(default=None, exclude_if=lambda method: method is None)
    """For `adapter`: any method that adapts, `recovery.method=astra`. It starts from the compressed model, and is kept
    apart in adapter/ and merged in recovered/."""
    loss: Literal["next_token", "distill"] = "next_token"
    """`next_token`, or `distill`: the divergence KL(original || compressed) of the predictions, at temperature 1. It
    keeps the original model in memory beside the compressed one."""
    data: str = "text"
    """Name of an instruction set; `text`: the windows that the method was calibrated on; `task`: what adapters learn
    of the task, `task.instructions`."""
    max_length: int = Field(default=256, ge=2)
    """Longest instruction with its answer in tokens, cut off beyond it; windows of text are as long as they are."""
    train_on_prompt: bool = False
    """Learn to predict the instructions too, not the answers alone."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling numerator of LoRA, which scales by alpha / rank."""
    sets: dict[str, InstructionSet] = Field(default_factory=dict)
    """The instruction sets by name; add your own with `recovery.sets.NAME={}`."""

    @property
    def instructions(self) -> InstructionSet | None:
        """The set to train on; None: text, the task's own sets, or no training."""
        return None if self.what == "none" or self.data in NO_SETS else self.sets[self.data]

    @property
    def learns_the_task(self) -> bool:
        """Whether it trains on `task.instructions`."""
        return self.what != "none" and self.data == "task"

    @model_validator(mode="after")
    def _trains_on_one_of_its_sets(self) -> "RecoveryConfig":
        if self.data not in (*NO_SETS, *self.sets):
            hint = did_you_mean(self.data, (*NO_SETS, *self.sets))
            raise ValueError(f"data='{self.data}' is neither text nor one of the instruction sets{hint}")
        return self

    @model_validator(mode="after")
    def _an_adapter_has_a_method(self) -> "RecoveryConfig":
        if (self.what == "adapter") != (self.method is not None):
            raise ValueError("what=adapter and method go together: recovery=adapter recovery.method=astra")
        return self
