"""What every backward pass over calibration text shares: a frozen model, blocks that are recomputed, the loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_kit.errors import LowRankKitError

Batch = Mapping[str, Tensor]


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no parameter wants a gradient, until the end; then everything is as it was.

    Raises `LowRankKitError` for a model without next-token head.
    """
    if model.get_output_embeddings() is None:
        raise LowRankKitError(
            "gradients of the next-token loss need a causal language model; this one has no such head"
        )
    was_training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)


@contextmanager
def recomputed(model: PreTrainedModel, blocks: Sequence[str]) -> Iterator[None]:
    """These blocks keep nothing for the backward pass but their arguments (gradient checkpointing)."""
    with ExitStack() as stack:
        for path in blocks:
            block = model.get_submodule(path)
            stack.enter_context(mock.patch.object(block, "forward", _recomputed(block.forward)))
        yield


def next_token_loss(model: PreTrainedModel, batch: Batch, ahead: int = 1) -> Float[Tensor, ""]:
    """Sum over real tokens of the negative log-likelihood of the token ``ahead`` places on, in float32."""
    ignored = -100
    # The logits are the largest tensor of all: no slice of them is copied, and the last places have no label instead.
    labels = torch.full_like(batch["input_ids"], ignored)
    labels[:, :-ahead] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), ignored)[:, ahead:]
    logits = model(**batch, use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="sum")


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
