"""The two classes of linear layer that transformers models are made of, behind one orientation."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankKitError

Linear: TypeAlias = nn.Linear | Conv1D


def check_linear(module: nn.Module, name: str) -> Linear:
    """Return ``module`` if it is a plain linear layer, else raise `LowRankKitError` naming its class.

    Subclasses do not count: a quantised or PEFT-wrapped layer keeps its weight in a form of its own.
    """
    if type(module) in (nn.Linear, Conv1D):
        return module  # type: ignore[return-value]
    raise LowRankKitError(
        f"'{name}' is a {type(module).__module__}.{type(module).__qualname__}; only torch.nn.Linear and "
        "transformers' Conv1D are understood. Load the model unquantised and without adapters."
    )


def is_transposed(module: Linear) -> bool:
    """Say whether the module stores its weight as ``[in, out]`` (GPT-2's Conv1D)."""
    return isinstance(module, Conv1D)


def weight_of(module: Linear) -> Float[Tensor, "out in"]:
    """Return the weight as ``[out, in]``: a view, never a copy."""
    return module.weight.T if is_transposed(module) else module.weight


@torch.no_grad()
def set_weight(module: Linear, weight: Float[Tensor, "out in"]) -> None:
    """Copy ``weight`` into the module in place, in the module's own orientation, dtype and device."""
    weight_of(module).copy_(weight)
