"""Metrics of labelled-text tasks, as GLUE defines them (Wang et al., arXiv 1804.07461, table 1)."""

from collections.abc import Callable, Sequence
from functools import partial

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lowrank_kit import distributed
from lowrank_kit.config import Metric
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.memory import fewer

BOOTSTRAP_SAMPLES = 200

METRICS: dict[Metric, Callable[[NDArray, NDArray], float]] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, values: pearsonr(labels, values).statistic,
    "spearman": lambda labels, values: spearmanr(labels, values).statistic,
}


def predictions_of(logits: NDArray) -> NDArray:
    """Classes of ``[rows, classes]`` logits; the values themselves of ``[rows, 1]`` (regression)."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)


def score(metric: Metric, labels: NDArray, predictions: NDArray) -> float:
    """One metric as a fraction; a correlation with a constant is 0."""
    if metric in ("pearson", "spearman", "matthews") and 0 in (np.ptp(labels), np.ptp(predictions)):
        return 0.0
    return float(METRICS[metric](labels, predictions))


def standard_error(metric: Metric, labels: NDArray, predictions: NDArray, seed: int = 0) -> float:
    """Bootstrap standard error over rows; exactly ``sqrt(p (1 - p) / n)`` for accuracy."""
    n = len(labels)
    if metric == "accuracy":
        p = score(metric, labels, predictions)
        return float(np.sqrt(p * (1 - p) / n))
    rng = np.random.default_rng(seed)
    draws = (rng.integers(n, size=n) for _ in range(BOOTSTRAP_SAMPLES))
    return float(np.std([score(metric, labels[rows], predictions[rows]) for rows in draws], ddof=1))


def majority(labels: Sequence[float], is_regression: bool) -> float:
    """The constant prediction that fits training labels best: their mode, or mean for regression."""
    if is_regression:
        return float(np.mean(labels))
    values, counts = np.unique(labels, return_counts=True)
    return float(values[counts.argmax()])


@torch.no_grad()
def predict(
    model: nn.Module, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: str
) -> NDArray[np.float32]:
    """Logits ``[rows, classes]`` of encoded rows, in their order; several processes read their shares of the rows.

    Batches are padded on the right with what the model takes for padding, whatever side ``tokenizer`` would pad on.
    Raises `LowRankKitError` for non-finite logits: they would be scored as if they meant something.
    """
    model.eval()
    texts, config = rows.remove_columns("labels"), getattr(model, "config", None)
    collate = RightPadded(
        tokenizer.pad_token_id if config is None else padding_id(tokenizer, config, rows["input_ids"])
    )

    def logits_of(numbers: Sequence[int]) -> list[NDArray[np.float32]]:
        loader = DataLoader(texts.select(numbers), fewer(batch_size), collate_fn=collate)
        return [logits for batch in loader for logits in model(**batch.to(device)).logits.float().cpu().numpy()]

    lengths = [len(ids) for ids in rows["input_ids"]]
    logits = np.stack(distributed.in_shares(logits_of, range(len(rows)), lengths))
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise LowRankKitError(
            f"{bad} of {len(logits)} rows have logits that are not finite; use dtype=float32 or bfloat16, "
            "or lower train.learning_rate"
        )
    return logits
