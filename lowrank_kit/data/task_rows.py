"""The rows of one task, encoded: what is trained on, evaluated on, and calibrated with, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowrank_kit.config import ClassificationTask, RunConfig
from lowrank_kit.data.encode import check_rows, encode_classification
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


def needed_splits(config: RunConfig, task: ClassificationTask) -> tuple[str, ...]:
    """The splits that a run of this task reads: with ``eval.held_out``, no evaluation split."""
    return (task.train_split,) if config.eval.held_out else (task.train_split, *task.eval_splits)


class TaskRows:
    """Loads and checks every split once; raises what the source and `check_rows` raise, before any model is needed.

    ``model`` is the configuration of the model that reads them: with it, `train`, `calibration` and `evaluation` raise
    `ConfigError` for rows that it cannot read. So they do for rows of which no token is left.
    """

    def __init__(
        self, config: RunConfig, task: ClassificationTask, source: Source, model: PretrainedConfig | None = None
    ) -> None:
        self._config, self._task, self._model = config, task, model
        for key, choice in (("eval.bos", config.eval.bos), ("calibration.bos", config.calibration.bos)):
            if choice != "auto":
                raise ConfigError(
                    f"{key}={choice} is for texts, benchmarks and instructions: labelled text ({task.name}) is read "
                    f"with the special tokens of the model's tokenizer; use {key}=auto"
                )
        splits = needed_splits(config, task)
        self._splits: dict[str, Rows] = {split: source.load(dataset_of(task), split) for split in splits}
        for split, rows in self._splits.items():
            check_rows(rows, task, split)
        train = self._splits[task.train_split].dataset
        self._held_out = None
        if held_out := config.eval.held_out:
            if held_out >= len(train):
                raise ConfigError(
                    f"eval.held_out={held_out} leaves nothing to train on: {task.name} has {len(train)} training rows"
                )
            shuffled = train.shuffle(seed=HELD_OUT_SEED)
            self._held_out = shuffled.select(range(held_out))
            train = shuffled.select(range(held_out, len(train)))
        self._train = train.shuffle(seed=config.seed)
        if config.train.train_samples:
            self._train = self._train.select(range(min(config.train.train_samples, len(train))))

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every split, for the manifest."""
        return {name: rows.facts() for name, rows in self._splits.items()}

    @property
    def train_labels(self) -> list[float]:
        """The training rows' labels."""
        return [float(label) for label in self._train[self._task.label_column]]

    def train(self, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Encoded training rows, in an order drawn by the seed."""
        return self._encode(self._train, self._task.train_split, tokenizer, self._max_length(tokenizer))

    def calibration(self, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """The first training rows, encoded as in training but cut to ``calibration.seq_len``."""
        settings = self._config.calibration
        rows = self._train.select(range(min(settings.samples, len(self._train))))
        length = min(settings.seq_len, self._max_length(tokenizer))
        return self._encode(rows, self._task.train_split, tokenizer, length)

    def evaluation(self, tokenizer: PreTrainedTokenizerBase) -> list[EvaluationRows]:
        """Encoded rows of every evaluation split, or of the held-out part of the training split."""
        task, limit = self._task, self._config.eval.limit
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
                    tokenizer,
                    self._max_length(tokenizer),
                ),
                remark + _described(self._splits[split], split),
            )
            for name, rows, split, remark in parts
        ]

    def _encode(
        self, rows: datasets.Dataset, split: str, tokenizer: PreTrainedTokenizerBase, length: int
    ) -> datasets.Dataset:
        encoded = encode_classification(rows, self._task, tokenizer, length)
        for number, ids in enumerate(encoded["input_ids"]):
            if fault := self._fault(ids, tokenizer):
                raise ConfigError(f"{self._place(split, rows[number])}: {self._task.name}: {fault}")
        return encoded

    def _fault(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Why the model cannot classify a row."""
        if not ids:
            return "no token is left of its text, so there is nothing to classify: write a text, or leave the row out"
        if self._model is None:
            return None
        if self._model.is_encoder_decoder:
            # The tokenizer ends every text of a pair.
            own = tokenizer(*("a" for _ in self._task.text_columns))["input_ids"].count(tokenizer.eos_token_id)
            if (ends := ids.count(tokenizer.eos_token_id)) > own:
                return (
                    f"the text holds the end token {tokenizer.eos_token} by itself ({ends} in all), and the model "
                    "classifies at the one that ends a row: take it out of the text"
                )
        return beyond(ids, tokenizer, self._model)

    def _place(self, split: str, row: Mapping[str, Any]) -> str:
        """Where the first row of the split with these texts is: shuffled ones have lost their numbers."""
        found, columns = self._splits[split], self._task.text_columns
        rows = zip(*(found.dataset[column][:] for column in columns), strict=True)
        return found.place(list(rows).index(tuple(row[column] for column in columns)))

    def _max_length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        # A tokenizer without a limit, of a model without one, gives a huge number here.
        return min(self._config.model.max_length or tokenizer.model_max_length, tokenizer.model_max_length, 2**16)


def _described(rows: Rows, split: str) -> str:
    return f"{rows.source}, {split}" + (f", {rows.note}" if rows.note else "")
