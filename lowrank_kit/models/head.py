"""The head of a causal language model, applied to a few positions at a time.

Logits over a large vocabulary are the largest tensor of a forward pass: 4096 positions of 262,144 tokens take 4 GiB in
float32, and a loss makes several copies. Here at most `LOGITS_AT_ONCE` of them exist at a time.
"""

from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.forward import forward_replaced

LOGITS_AT_ONCE = 2**24
"""Logits that exist at a time: 64 MiB a copy in float32."""


class Head:
    """What a model makes of its last hidden states: the output layer, and whatever its family does to the logits.

    The model's own forward pass is used for both halves, so that scaled or soft-capped logits are as they should be.
    Raises `LowRankKitError` for a model without next-token head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.get_output_embeddings() is None:
            raise LowRankKitError("the next-token loss needs a causal language model; this one has no such head")
        self._model, self._decoder = model, model.get_decoder()

    def hidden(self, **inputs: Any) -> Float[Tensor, "rows tokens hidden"]:
        """The last hidden states for the model's ``inputs``, behind the final norm; the head is not run."""
        found: list[Tensor] = []

        def reached(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output[0])
            raise _Reached

        handle = self._decoder.register_forward_hook(reached)
        try:
            with suppress(_Reached):
                self._model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return found[0]

    def logits(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocabulary"]:
        """The logits that the model gives for these hidden states, each by itself."""

        def known(*_args: Any, **_options: Any) -> _KnownStates:
            return _KnownStates(last_hidden_state=hidden[None])  # type: ignore[arg-type]

        # What is read does not matter: the decoder hands over what is known.
        unread = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with forward_replaced(self._decoder, known):
            logits: Tensor = self._model(input_ids=unread, use_cache=False).logits[0]
        return logits

    def positions_at_once(self) -> int:
        """How many positions' logits may exist at a time."""
        return max(1, LOGITS_AT_ONCE // self._model.config.get_text_config().vocab_size)

    def summed_loss(self, hidden: Float[Tensor, "n hidden"], tokens: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        """Sum of the negative log-likelihoods (nats) that these hidden states give to these ``tokens``, in float32.

        Differentiable in ``hidden`` alone. The gradient is computed along with the loss, some positions at a time: no
        logits wait for the backward pass, and none are computed twice.
        """
        total: Tensor = _SummedLoss.apply(hidden, tokens, self)  # type: ignore[no-untyped-call]
        return total


class _KnownStates(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder returns, the last hidden states alone; what its family returns beside them is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Reached(Exception):
    """Unwinds a forward pass whose rest is not needed."""


class _SummedLoss(torch.autograd.Function):
    """See `Head.summed_loss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
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
        (of_sum,) = ctx.saved_tensors
        return of_sum * gradient.to(of_sum.dtype), None, None
