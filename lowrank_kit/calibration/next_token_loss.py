"""The losses whose gradients calibration reads."""

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int64

from lowrank_kit.calibration.batches import Batch
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.errors import LowRankKitError

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
