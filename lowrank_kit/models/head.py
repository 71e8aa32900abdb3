"""The head of a causal language model, applied to a few positions at a time.

Logits over a large vocabulary are the largest tensor of a forward pass: 4096 positions of 262,144 tokens take 4 GiB in
float32, and a loss makes several copies. Here at most `LOGITS_AT_ONCE` of them exist at a time.
"""

from contextlib import suppress
from typing import Any

from jaxtyping import Float, Int64

from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, torch
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
        decoder: Any = model.get_decoder()
        # Llama 4 does not find its own.
        self._model, self._decoder = model, model.model if decoder is model else decoder

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
        from lowrank_kit.models.known_states import KnownStates

        def known(*_args: Any, **_options: Any) -> KnownStates:
            return KnownStates(last_hidden_state=hidden[None])  # type: ignore[arg-type]

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
        from lowrank_kit.models.summed_loss import SummedLoss

        total: Tensor = SummedLoss.apply(hidden, tokens, self)  # type: ignore[no-untyped-call]
        return total


class _Reached(Exception):
    """Unwinds a forward pass whose rest is not needed."""
