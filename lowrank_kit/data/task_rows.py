"""The rows of one task, encoded: what is trained on, evaluated on, and calibrated with, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from lowrank_kit.config import CalibrationConfig, ClassificationTask, EvalConfig, Method
from lowrank_kit.data.encode import check_rows, encode_classification
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import DatasetRef, Rows, Source
from lowrank_kit.data.special_tokens import beyond
from lowrank_kit.errors import ConfigError

# Fixed, so that every seed and every method is evaluated on the same held-out rows.
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class EvaluationRows:
    """Encoded rows to evaluate on; ``name`` is the task's, with the split's where the task has several."""

    name: str
    rows: datasets.Dataset
    source: str


def dataset_of(task: ClassificationTask) -> DatasetRef:
    """The set whose rows a task reads."""
    return DatasetRef(task.name, task.hub_path, task.hub_name)


def needed_splits(settings: EvalConfig, task: ClassificationTask) -> tuple[str, ...]:
    """The splits that a run of this task reads: with ``eval.held_out``, no evaluation split."""
    return (task.train_split,) if settings.held_out else (task.train_split, *task.eval_splits)


class TaskRows:
    """Loads and checks every split once; raises what the source and `check_rows` raise, before any model is needed.

    ``seed`` draws the order of the training rows, and which ``train_samples`` of them are read (None: all). `train`,
    `calibration` and `evaluation` raise `ConfigError` for rows that the reader's model cannot read, and for rows of
    which no token is left.
    """

    def __init__(
        self,
        task: ClassificationTask,
        source: Source,
        settings: EvalConfig,
        calibration: CalibrationConfig,
        *,
        seed: int,
        train_samples: int | None = None,
    ) -> None:
        self._task, self._settings, self._calibration = task, settings, calibration
        for key, choice in (("eval.bos", settings.bos), ("calibration.bos", calibration.bos)):
            if choice != "auto":
                raise ConfigError(
                    f"{key}={choice} is for texts, benchmarks and instructions: labelled text ({task.name}) is read "
                    f"with the special tokens of the model's tokenizer; use {key}=auto"
                )
        splits = needed_splits(settings, task)
        self._splits: dict[str, Rows] = {split: source.load(dataset_of(task), split) for split in splits}
        for split, rows in self._splits.items():
            check_rows(rows, task, split)
        train = self._splits[task.train_split].dataset
        self._held_out = None
        if held_out := settings.held_out:
            if held_out >= len(train):
                raise ConfigError(
                    f"eval.held_out={held_out} leaves nothing to train on: {task.name} has {len(train)} training rows"
                )
            shuffled = train.shuffle(seed=HELD_OUT_SEED)
            self._held_out = shuffled.select(range(held_out))
            train = shuffled.select(range(held_out, len(train)))
        self._train = train.shuffle(seed=seed)
        if train_samples:
            self._train = self._train.select(range(min(train_samples, len(train))))

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every split, for the manifest."""
        return {name: rows.facts() for name, rows in self._splits.items()}

    def check_lengths(self, reader: Reader, method: Method) -> None:
        """Nothing can be too short: rows are as long as they are."""

    @property
    def train_labels(self) -> list[float]:
        """The training rows' labels."""
        return [float(label) for label in self._train[self._task.label_column]]

    def train(self, reader: Reader) -> datasets.Dataset:
        """Encoded training rows, in an order drawn by the seed."""
        return self._encode(self._train, self._task.train_split, reader, _longest(reader))

    def calibration(self, reader: Reader) -> datasets.Dataset:
        """The first training rows, encoded as in training but cut to ``calibration.seq_len``."""
        rows = self._train.select(range(min(self._calibration.samples, len(self._train))))
        length = min(self._calibration.seq_len, _longest(reader))
        return self._encode(rows, self._task.train_split, reader, length)

    def evaluation(self, reader: Reader) -> list[EvaluationRows]:
        """Encoded rows of every evaluation split, or of the held-out part of the training split."""
        task, limit = self._task, self._settings.limit
        if self._held_out is not None:
            parts = [(task.name, self._held_out, task.train_split, "held out of training; ")]
        else:
            several = len(task.eval_splits) > 1
            parts = [
                (f"{task.name}:{split}" if several else task.name, self._splits[split].dataset, split, "")
                for split in task.eval_splits
            ]
        return [
            EvaluationRows(
                name,
                self._encode(
                    rows.select(range(min(limit or len(rows), len(rows)))),
                    split,
                    reader,
                    _longest(reader),
                ),
                remark + _described(self._splits[split], split),
            )
            for name, rows, split, remark in parts
        ]

    def _encode(self, rows: datasets.Dataset, split: str, reader: Reader, length: int) -> datasets.Dataset:
        encoded = encode_classification(rows, self._task, reader.tokenizer, length)
        for number, ids in enumerate(encoded["input_ids"]):
            if fault := self._fault(ids, reader):
                raise ConfigError(f"{self._place(split, rows[number])}: {self._task.name}: {fault}")
        return encoded

    def _fault(self, ids: list[int], reader: Reader) -> str | None:
        """Why the model cannot classify a row."""
        tokenizer, model = reader.tokenizer, reader.model
        if not ids:
            return "no token is left of its text, so there is nothing to classify: write a text, or leave the row out"
        if model is None:
            return None
        if model.is_encoder_decoder:
            # The tokenizer ends every text of a pair.
            own = tokenizer(*("a" for _ in self._task.text_columns))["input_ids"].count(tokenizer.eos_token_id)
            if (ends := ids.count(tokenizer.eos_token_id)) > own:
                return (
                    f"the text holds the end token {tokenizer.eos_token} by itself ({ends} in all), and the model "
                    "classifies at the one that ends a row: take it out of the text"
                )
        return beyond(ids, tokenizer, model)

    def _place(self, split: str, row: Mapping[str, Any]) -> str:
        """Where the first row of the split with these texts is: shuffled ones have lost their numbers."""
        found, columns = self._splits[split], self._task.text_columns
        rows = zip(*(found.dataset[column][:] for column in columns), strict=True)
        return found.place(list(rows).index(tuple(row[column] for column in columns)))


def _longest(reader: Reader) -> int:
    # A tokenizer without a limit, of a model without one, gives a huge number.
    return min(reader.longest, 2**16)


def _described(rows: Rows, split: str) -> str:
    return f"{rows.source}, {split}" + (f", {rows.note}" if rows.note else "")
