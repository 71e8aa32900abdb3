"""The loss of a causal model's head, computed with its gradient some positions at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowrank_kit.models.head import Head


class SummedLoss(torch.autograd.Function):
    """See `Head.summed_loss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
        """The sum, and its gradient in ``hidden`` for later."""
        size, wants_gradient = head.positions_at_once(), ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradients = []
        for part, wanted in zip(hidden.split(size), tokens.split(size), strict=True):
            with torch.set_grad_enabled(wants_gradient):
                read = part.detach().requires_grad_(wants_gradient)
                logits = head.logits(read)
                loss = cross_entropy(logits.to(total.dtype), wanted.to(logits.device), reduction="sum")
            if wants_gradient:
                gradients += torch.autograd.grad(loss, read)
            total += loss.detach().to(total.device)
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The gradient computed before."""
        (of_sum,) = ctx.saved_tensors
        return of_sum * gradient.to(of_sum.dtype), None, None
