"""Perplexity of answers to held-out instructions: what hyper-parameters of a fine-tuning are chosen by."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lowrank_kit import distributed
from lowrank_kit.evaluation.perplexity import Perplexity


@torch.no_grad()
def answer_perplexity(
    model: nn.Module,
    rows: datasets.Dataset,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    device: str,
) -> Perplexity:
    """Perplexity over all tokens that have a label, each predicted from those before it.

    Args:
        model: a causal one, on ``device``; put into evaluation mode.
        rows: ``input_ids`` and ``labels``, where -100 is not predicted.
        collate: makes a right-padded batch of rows.
        batch_size: rows a forward pass.
        device: where the model is; several processes read their shares of the rows.

    Returns:
        ``per_window`` holds the mean of every row; the standard error is that of a ratio of sums over rows.
    """
    model.eval()

    def losses_of(numbers: Sequence[int]) -> list[tuple[float, int]]:
        losses = []
        for start in range(0, len(numbers), batch_size):
            batch = collate([rows[i] for i in numbers[start : start + batch_size]]).to(device)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            for row, wanted in zip(logits, labels, strict=True):
                learnt = wanted != -100
                loss = cross_entropy(row[learnt].float(), wanted[learnt], reduction="none").double().sum()
                losses.append((float(loss), int(learnt.sum())))
        return losses

    sums, counts = zip(*distributed.in_shares(losses_of, range(len(rows))), strict=True)
    nll, n = sum(sums) / sum(counts), len(sums)
    residuals = sum((s - nll * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(residuals * n / (n - 1)) / sum(counts) if n > 1 else None
    value = math.exp(nll)
    means = tuple(s / max(c, 1) for s, c in zip(sums, counts, strict=True))
    return Perplexity(value, nll, None if error is None else value * error, sum(counts), means)
