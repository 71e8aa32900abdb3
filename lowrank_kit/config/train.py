"""The schedule of a training."""

from typing import Literal

from pydantic import Field

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
