"""The gradient of the loss in the weights of some linears: one backward pass over the calibration set."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.backward import Batch, frozen, next_token_loss, recomputed
from lowrank_kit.calibration.prefix import Prefix
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.linear import check_linear, is_transposed

ACTIVATION_BYTES = 2 * 2**30
"""Activations of a batch, about, that may wait for the backward pass; blocks for which this has no room recompute."""


def weight_gradients(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    refs: Collection[LinearRef],
    *,
    ahead: int = 1,
    prefix: Prefix | None = None,
    on_batch: Callable[[], object] | None = None,
) -> dict[str, Float32[Tensor, "out in"]]:
    """Return ``dL/dW`` by name, L the mean loss over all predicted tokens of all batches.

    Gradients are summed in float32 whatever the model's dtype, and held for these linears only. Blocks below the
    lowest of them build no graph. Of the others, the last keep their activations for the backward pass as far as
    `ACTIVATION_BYTES` go; those below recompute them.

    Args:
        model: a causal language model, in evaluation mode meanwhile; left as it was found.
        layout: its layout.
        batches: `[rows, tokens]` model inputs with attention masks; padded positions are not counted.
        refs: the linears wanted.
        ahead: which token is predicted; 1: the next one.
        prefix: hidden states of the same batches, to begin the passes at.
        on_batch: called after every batch.

    Raises:
        LowRankKitError: a model without next-token head, nothing to predict, or gradients that are not finite.
    """
    predicted = sum(int(batch["attention_mask"][:, ahead:].sum()) for batch in batches)
    if predicted == 0:
        raise LowRankKitError(
            f"no calibration window has more than {ahead} tokens, so there is no loss; raise calibration.seq_len"
        )
    lowest = min(ref.block for ref in refs)
    sums: dict[str, Tensor] = {}
    with frozen(model), ExitStack() as stack:
        for ref in refs:
            weight = check_linear(model.get_submodule(ref.name), ref.name).weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
            stack.callback(weight.register_post_accumulate_grad_hook(_adding_to(sums, ref.name)).remove)
        keeping = _blocks_that_fit(layout, max(batch["input_ids"].numel() for batch in batches), model.dtype)
        stack.enter_context(recomputed(model, layout.blocks[lowest : max(lowest, len(layout.blocks) - keeping)]))
        for number, batch in enumerate(batches):
            with ExitStack() as start, torch.enable_grad():
                if prefix is not None:
                    start.enter_context(prefix.resumed(number, lowest, model.device))
                inputs = {k: v.to(model.device) for k, v in batch.items()}
                next_token_loss(model, inputs, ahead).backward()  # type: ignore[no-untyped-call]
            if on_batch is not None:
                on_batch()
    for ref in refs:
        gradient = sums[ref.name].div_(predicted)
        if not gradient.isfinite().all():
            raise LowRankKitError(
                f"the gradient of the loss in {ref.name} is not finite: use dtype=bfloat16 or float32, and look for "
                "weights that are not finite"
            )
        sums[ref.name] = (
            gradient.T if is_transposed(check_linear(model.get_submodule(ref.name), ref.name)) else gradient
        )
    return sums


def _blocks_that_fit(layout: ModelLayout, tokens: int, dtype: torch.dtype) -> int:
    """What waits of a block is about as much as goes in and out of its linears."""
    width = sum(ref.in_features + ref.out_features for ref in layout.linears) / len(layout.blocks)
    return int(ACTIVATION_BYTES / (tokens * width * dtype.itemsize))


def _adding_to(sums: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """Half precision would lose small gradients in a long sum, so that it is not left to autograd."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.float(), None
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient

    return hook
