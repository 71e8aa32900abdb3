"""Rows of a labelled-text task as the token sequences that a model reads, in training and in calibration alike."""

import math
from collections.abc import Mapping

import datasets
from transformers import PreTrainedTokenizerBase

from lowrank_kit.config import ClassificationTask
from lowrank_kit.data.sources import Rows
from lowrank_kit.errors import ConfigError


def check_rows(found: Rows, task: ClassificationTask, split: str) -> None:
    """Raise `ConfigError` for rows that lack the task's columns, their text or their labels. Needs no model."""
    rows = found.dataset
    if not len(rows):
        raise ConfigError(f"{task.name}: the split '{split}' has no rows")
    needed = [*task.text_columns, task.label_column]
    if lacking := [name for name in needed if name not in rows.column_names]:
        raise ConfigError(
            f"{task.name}: the rows of '{split}' have no column {', '.join(lacking)}; "
            f"they have {', '.join(rows.column_names)}"
        )
    for column in task.text_columns:
        check_texts(found, column, f"{task.name}: column '{column}' of '{split}'")
    labels = rows[task.label_column][:]
    if bad := [number for number, label in enumerate(labels) if not _is_label(label, task.labels)]:
        legal = "numbers" if task.labels == 1 else f"classes 0 to {task.labels - 1}"
        wrong = sorted({repr(labels[number]) for number in bad})
        if isinstance(labels[bad[0]], bool):
            remedy = "write 0 for false and 1 for true"
        elif labels[bad[0]] == -1:
            remedy = "the hub marks hidden test labels by -1: choose a split that has labels"
        else:
            remedy = f"write {legal} into column '{task.label_column}', or name another one by task.label_column"
        raise ConfigError(
            f"{found.place(bad[0])}: {task.name}: labels {', '.join(wrong[:5])} of '{split}' are not {legal}; {remedy}"
        )


def check_texts(found: Rows, column: str, what: str) -> None:
    """Raise `ConfigError` where a column holds what is no text; ``what`` says which column of which rows."""
    for number, value in enumerate(found.dataset[column][:]):
        if not isinstance(value, str):
            raise ConfigError(
                f"{found.place(number)}: {what} holds {value!r}, which is no text: write a string, or leave the row out"
            )


def _is_label(value: object, classes: int) -> bool:
    # A boolean is an integer to Python and no class to a model.
    if isinstance(value, bool):
        return False
    if classes == 1:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int) and 0 <= value < classes


def encode_classification(
    rows: datasets.Dataset, task: ClassificationTask, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Tokenise without padding; columns are the tokenizer's own and ``labels`` (int, or float for regression).

    A pair goes in as the tokenizer joins pairs where it sets a separator between them, else as two lines. Special
    tokens are the tokenizer's own: labelled text is read as its family reads it. The rows have passed `check_rows`.
    """
    is_regression = task.labels == 1
    separates = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)

    def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in task.text_columns]
        if not separates:
            texts = [["\n".join(parts) for parts in zip(*texts, strict=True)]]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        encoded.pop("attention_mask", None)
        return {**encoded, "labels": [float(y) if is_regression else y for y in batch[task.label_column]]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names)
