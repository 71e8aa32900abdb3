"""What is trained on, and how: the schedule, and sets of instructions."""

from typing import Literal

from pydantic import Field, model_validator

from lowrank_kit.config.section import Section


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
