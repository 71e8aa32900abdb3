"""How far a training moves the hidden states of a model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_kit.models.modes import evaluating


@torch.no_grad()
def hidden_states(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Sequence[Mapping[str, Tensor]]
) -> list[Float[Tensor, "tokens n"]]:
    """What comes out of every block over all tokens of unpadded inputs (one row each), float32 on the CPU."""
    found: list[list[Tensor]] = [[] for _ in blocks]

    def keep(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[number].append(hidden.flatten(0, -2).float().cpu())

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for number, block in enumerate(blocks):
            hook = block.register_forward_hook(lambda module, args, output, number=number: keep(number, output))
            stack.callback(hook.remove)
        for row in inputs:
            model(**row)
    return [torch.cat(parts) for parts in found]


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """Relative change ``|h' - h| / |h|`` (Frobenius) of the hidden states behind every block."""
    return [float((new - old).norm() / old.norm()) for old, new in zip(before, after, strict=True)]
