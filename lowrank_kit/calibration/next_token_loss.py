"""The losses whose gradients calibration reads."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Float64, Int64

from lowrank_kit.calibration.batches import Batch
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.deferred import PreTrainedModel, Tensor, no_grad, torch
from lowrank_kit.errors import LowRankKitError

if TYPE_CHECKING:
    from lowrank_kit.models.head import Head
else:
    Head = Any

SummedLoss = Callable[[PreTrainedModel, Batch], tuple[Float[Tensor, ""], int]]
"""The sum of a batch's losses, and of how many things: means over all batches weigh each of these alike."""


def next_token_loss(model: PreTrainedModel, batch: Batch, ahead: int = 1) -> tuple[Float[Tensor, ""], int]:
    """Sum over predicted tokens of their negative log-likelihood (nats) in float32, and how many those are.

    Position t predicts token t + ``ahead``; which tokens count is for `predicted_tokens` to say. As a `SummedLoss`: the
    mean is that over all predicted tokens. Raises `LowRankKitError` for a model without next-token head.
    """
    from lowrank_kit.models.head import Head

    labels, head = predicted_tokens(batch, ahead), Head(model)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    predicting = labels != NOT_PREDICTED
    hidden = head.hidden(**inputs)
    predicting, labels = predicting.to(hidden.device), labels.to(hidden.device)
    return head.summed_loss(hidden[predicting], labels[predicting]), int(predicting.sum())


def sampled_token_loss(model: PreTrainedModel, batch: Batch, seed: int) -> tuple[Float[Tensor, ""], int]:
    """As `next_token_loss`, of tokens drawn from the model's own predictions in the places of those of the text.

    The expectation of ``g g^T`` over them is the Fisher information, which is the Gauss-Newton matrix of the loss; with
    the text's own tokens it is the empirical Fisher (Kunstner et al., arXiv 1905.12558). A row has the same draws in
    any batch, on any device and in any process: they depend on its tokens and on ``seed``.
    """
    from lowrank_kit.models.head import Head

    predicting, head = predicted_tokens(batch) != NOT_PREDICTED, Head(model)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    uniform = torch.stack([_uniform(ids, mask, seed) for ids, mask in zip(*_rows(batch), strict=True)])
    hidden = head.hidden(**inputs)
    hidden, uniform = hidden[predicting.to(hidden.device)], uniform[predicting.cpu()].to(hidden.device)
    return head.summed_loss(hidden, _drawn(head, hidden.detach(), uniform)), int(predicting.sum())


@no_grad
def _drawn(head: Head, hidden: Float[Tensor, "n hidden"], uniform: Float64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The token at which each position's cumulated probability passes its number between 0 and 1."""
    size, drawn = head.positions_at_once(), []
    for states, numbers in zip(hidden.split(size), uniform.split(size), strict=True):
        cumulated = head.logits(states).double().softmax(-1).cumsum(-1)
        # Round-off may leave the last sum below 1.
        drawn.append(torch.searchsorted(cumulated, numbers[:, None])[:, 0].clamp(max=cumulated.shape[-1] - 1))
    return torch.cat(drawn)


def _rows(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()


def _uniform(ids: Int64[Tensor, " tokens"], mask: Bool[Tensor, " tokens"], seed: int) -> Float64[Tensor, " tokens"]:
    """A number between 0 and 1 for every position, which the row's real tokens and the seed determine."""
    digest = hashlib.sha256(f"{seed}:{ids[mask].tolist()}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(len(ids), generator=generator, dtype=torch.float64)


def model_loss(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, ""], int]:
    """The loss that the model itself has for the batch's ``labels``, as a `SummedLoss`.

    Its mean is over rows for a classifier, over the labels that are not `NOT_PREDICTED` for an encoder-decoder model.
    """
    labels = batch["labels"]
    count = int((labels != NOT_PREDICTED).sum()) if model.config.is_encoder_decoder and labels.ndim > 1 else len(labels)
    loss: Tensor = model(**batch).loss
    return loss * count, count


def predicted_tokens(batch: Batch, ahead: int = 1) -> Int64[Tensor, "rows tokens"]:
    """The token that every position of a batch predicts, the one ``ahead`` places on; `NOT_PREDICTED` where none.

    Padding is not predicted; nor is a token that the batch's ``labels``, if it has any, leave out.
    """
    tokens = batch.get("labels", batch["input_ids"]).masked_fill(~batch["attention_mask"].bool(), NOT_PREDICTED)
    labels = torch.full_like(tokens, NOT_PREDICTED)
    labels[:, :-ahead] = tokens[:, ahead:]
    return labels


def check_predicted(batches: Sequence[Batch], ahead: int = 1) -> None:
    """Raise `LowRankKitError` where no token of any batch is predicted."""
    if not any(bool((predicted_tokens(batch, ahead) != NOT_PREDICTED).any()) for batch in batches):
        raise LowRankKitError(
            f"no calibration window has more than {ahead} tokens, so there is no loss; raise calibration.seq_len"
        )
