"""Weights that learn are held in float32, whatever the model is stored in.

A step that is less than half a unit in the last place of a weight is rounded away: of bfloat16, which has 8 bits, one
below 1/512 of the weight.
"""

from typing import Any

from torch import Tensor, nn


def hold_in_float32(module: nn.Module) -> None:
    """Hold a module on top of a model of another dtype in float32: its parameters, what it computes, and its output."""
    module.float()
    module.register_forward_pre_hook(_as_its_weights)


def _as_its_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
