"""Perplexity by the protocol of the papers on compression: fixed windows of one long text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64
from rich.progress import Progress

from lowrank_kit import distributed
from lowrank_kit.deferred import PreTrainedModel, Tensor, no_grad, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.head import Head
from lowrank_kit.models.memory import fewer
from lowrank_kit.progress import Bar


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it is made of.

    ``value`` is the exponential of ``nll``, the mean negative log-likelihood (nats) over all predicted tokens;
    ``stderr`` that of ``value`` over windows, by the delta method (None for a single window); ``tokens`` the
    number of predicted tokens; ``per_window`` the mean negative log-likelihood of every window.
    """

    value: float
    nll: float
    stderr: float | None
    tokens: int
    per_window: tuple[float, ...]


@no_grad
def perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "windows tokens"],
    batch_size: int = 1,
    device: "str | torch.device" = "cpu",
    progress: Progress | None = None,
    description: str = "perplexity",
) -> Perplexity:
    """Perplexity of a causal model: every token of a window but the first is predicted from those before it.

    Args:
        model: on ``device``; put into evaluation mode.
        windows: token ids without padding.
        batch_size: windows per forward pass; changes memory and speed only; logits exist some positions at a time.
        device: where the model is; several processes read their shares of the windows.
        progress: shows a bar over the windows of this process, labelled ``description``.

    Raises `LowRankKitError` that names the first window with logits that are not finite.
    """
    model.eval()
    head, batch_size = Head(model), fewer(batch_size)

    def means_of(numbers: Sequence[int]) -> list[float]:
        means: list[float] = []
        bar = Bar(progress, description, len(numbers))
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            inputs = windows[list(batch)].to(device)
            hidden = head.hidden(input_ids=inputs)
            for number, row, targets in zip(batch, hidden, inputs, strict=True):
                losses = _losses(head, row[:-1], targets[1:])
                if not losses.isfinite().all():
                    raise LowRankKitError(
                        f"window {number} of {len(windows)} has logits that are not finite, so there is no perplexity; "
                        "use dtype=float32 or bfloat16, or remove less (method.ratio)"
                    )
                means.append(float(losses.mean()))
            bar.advance(len(batch))
        return means

    means = distributed.in_shares(means_of, range(len(windows)))
    # All windows predict equally many tokens: the mean of their means is the mean over tokens.
    spread = torch.tensor(means, dtype=torch.float64)
    nll = float(spread.mean())
    value = math.exp(nll)
    stderr = value * float(spread.std()) / math.sqrt(len(means)) if len(means) > 1 else None
    return Perplexity(value, nll, stderr, windows.numel() - len(windows), tuple(means))


def _losses(
    head: Head, hidden: Float[Tensor, "predicted hidden"], targets: Int64[Tensor, " predicted"]
) -> Float64[Tensor, " predicted"]:
    """Negative log-likelihoods; NaN for every row with a logit that is not finite, be it the target's or not."""
    parts, size = [], head.positions_at_once()
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head.logits(part)
        loss = torch.nn.functional.cross_entropy(logits.float(), target.to(logits.device), reduction="none").double()
        parts.append(loss.masked_fill(~logits.isfinite().all(1), torch.nan))
    return torch.cat(parts)
