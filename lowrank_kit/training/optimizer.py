"""AdamW over whatever of a model requires gradients, in groups of their own learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lowrank_kit.config import TrainConfig


def adamw(
    model: nn.Module, settings: TrainConfig, *, new: Sequence[str] = (), up_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Make the optimiser of a training.

    Args:
        model: what is trained.
        settings: learning rates and weight decay.
        new: module paths, or parts of them, of newly initialised modules: they learn at ``head_learning_rate``.
        up_ratio: learning rate of a LoRA's B over that of A (LoRA+, arXiv 2402.12354, by PEFT's helper); None: equal.
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = [p for name, p in learning.items() if any(f".{part}." in f".{name}" for part in new)]
    if up_ratio is None:
        groups: list[dict[str, Any]] = [{"params": list(learning.values())}]
    else:
        plus = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=settings.learning_rate,
            loraplus_lr_ratio=up_ratio,
            loraplus_weight_decay=settings.weight_decay,
        )
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in plus.param_groups]
    known = {id(p) for p in heads}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in known]
    groups.append({"params": heads, "lr": settings.head_learning_rate or settings.learning_rate})
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
