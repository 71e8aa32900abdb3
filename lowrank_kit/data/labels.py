"""Which output of a trained classifier is which class of a task: by name, as both tell them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lowrank_kit.config import ClassificationTask
from lowrank_kit.errors import ConfigError


@dataclass(frozen=True)
class LabelOrder:
    """``outputs[c]`` is the model's output for the task's class c; as many as the task has classes, or one number."""

    outputs: tuple[int, ...]

    def for_model(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows with ``labels`` as the model counts classes."""
        if self._changes_nothing:
            return rows
        return rows.map(lambda row: {"labels": self.outputs[row["labels"]]})

    def for_task(self, labels: NDArray) -> NDArray:
        """The task's classes ``[rows]`` of labels that `for_model` wrote."""
        return labels if self._changes_nothing else np.argsort(self.outputs)[labels]

    def logits(self, logits: NDArray) -> NDArray:
        """Logits ``[rows, classes]`` in the order of the task's classes."""
        return logits[:, list(self.outputs)]

    @property
    def _changes_nothing(self) -> bool:
        return self.outputs == tuple(range(len(self.outputs)))


def brings_a_head(config: PretrainedConfig) -> bool:
    """Whether the checkpoint says that it is a trained classifier's."""
    return "ForSequenceClassification" in str(config.architectures)


def check_labels(config: PretrainedConfig, task: ClassificationTask) -> None:
    """Raise `ConfigError` for a checkpoint with a trained head that cannot be this task's. Reads no weight."""
    if brings_a_head(config):
        label_order(config, task)


def name_classes(config: PretrainedConfig, task: ClassificationTask) -> None:
    """Name the outputs of a new head after the task's classes."""
    names = task.label_names or [f"LABEL_{i}" for i in range(task.labels)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def label_order(config: PretrainedConfig, task: ClassificationTask) -> LabelOrder:
    """Map the classes of a trained head to the task's, by name.

    Names are compared without case and punctuation. ``LABEL_0``, or ``0``, is the task's class 0. Raises `ConfigError`
    for another number of classes than the task's, and for names that are not the task's.
    """
    identity = LabelOrder(tuple(range(task.labels)))
    found = [config.id2label[i] for i in sorted(config.id2label)]
    remedy = (
        "Give a checkpoint that was trained for this task, or one without a head, to which a new head is put: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(BODY) writes it, and the tokenizer belongs beside it"
    )
    if len(found) != task.labels:
        raise ConfigError(
            f"the head of '{config.name_or_path}' has {len(found)} classes ({', '.join(map(str, found))}), and "
            f"{task.name} needs {task.labels} (task.labels). {remedy}"
        )
    if task.labels == 1:
        return identity
    for names in (task.label_names, [f"LABEL_{i}" for i in range(task.labels)], [str(i) for i in range(task.labels)]):
        if (order := _matched(found, names)) is not None:
            return LabelOrder(order)
    wanted = ", ".join(task.label_names) or "not named: set task.label_names=[...] in the order of the rows' labels"
    raise ConfigError(
        f"the classes of '{config.name_or_path}' ({', '.join(map(str, found))}) are not those of {task.name} "
        f"({wanted}), so its outputs cannot be told apart. {remedy}"
    )


def _matched(found: Sequence[object], names: Sequence[str]) -> tuple[int, ...] | None:
    ours, theirs = [_plain(name) for name in names], [_plain(str(name)) for name in found]
    return tuple(theirs.index(name) for name in ours) if sorted(ours) == sorted(theirs) else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name).strip("_").casefold()
