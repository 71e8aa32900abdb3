"""Rows of a labelled-text task as the token sequences that a model reads, in training and in calibration alike."""

import datasets
from transformers import PreTrainedTokenizerBase

from lowrank_kit.config import ClassificationTask
from lowrank_kit.errors import LowRankKitError


def encode_classification(
    rows: datasets.Dataset, task: ClassificationTask, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Tokenise without padding; columns are the tokenizer's own and ``labels`` (int, or float for regression).

    A pair goes in as the tokenizer joins pairs where it sets a separator between them, else as two lines.
    Raises `LowRankKitError` for rows without the task's columns or without labels.
    """
    needed = [*task.text_columns, task.label_column]
    if lacking := [name for name in needed if name not in rows.column_names]:
        raise LowRankKitError(
            f"{task.name}: the rows have no column {', '.join(lacking)}; they have {', '.join(rows.column_names)}"
        )
    labels = rows[task.label_column]
    is_regression = task.labels == 1
    if not is_regression and (wrong := sorted({y for y in labels if not 0 <= y < task.labels})):
        raise LowRankKitError(
            f"{task.name}: labels {wrong} are not classes 0 to {task.labels - 1}; "
            "the hub marks hidden test labels by -1: choose a split that has labels"
        )
    separates = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in task.text_columns]
        if not separates:
            texts = [["\n".join(parts) for parts in zip(*texts, strict=True)]]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        encoded.pop("attention_mask")
        return {**encoded, "labels": [float(y) if is_regression else y for y in batch[task.label_column]]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names)
