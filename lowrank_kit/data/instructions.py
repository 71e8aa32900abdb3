"""Instructions and their answers, in the Alpaca format, as token sequences whose labels are the answers alone."""

import logging
from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lowrank_kit.config import InstructionSet
from lowrank_kit.data.sources import DatasetRef, Source
from lowrank_kit.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not learnt: what torch's cross-entropy leaves out."""

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with and without an input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Instructions:
    """The rows of one instruction set, loaded and checked once.

    Raises `ConfigError` for a set that the source lacks, columns that the rows lack and values that are no text.
    """

    def __init__(self, name: str, columns: InstructionSet, source: Source) -> None:
        self._name, self._columns = name, columns
        try:
            self._rows = source.load(DatasetRef(name, columns.hub_path, columns.hub_name), columns.split)
        except ConfigError as error:
            raise ConfigError(f"recovery.data={name}: {error}. Without instructions: recovery.data=text") from error
        self._check(self._rows.dataset)

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size, for the manifest."""
        return {f"{self._name}:{self._columns.split}": self._rows.facts()}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False
    ) -> datasets.Dataset:
        """Prompt, answer and end of text as ``input_ids``, cut at ``max_length``; prompt tokens have no label.

        A row whose prompt alone fills ``max_length`` has nothing to learn and is left out. Raises `ConfigError` where
        that is every row.
        """

        def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            prompts = tokenizer([self._prompt(row) for row in rows], verbose=False)["input_ids"]
            answers = tokenizer([self._answer(row) for row in rows], add_special_tokens=False, verbose=False)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            encoded: dict[str, list] = {"input_ids": [], "labels": []}
            for prompt, answer in zip(prompts, answers["input_ids"], strict=True):
                learnt = [*answer, *end]
                unlearnt = prompt if train_on_prompt else [IGNORED] * len(prompt)
                if len(prompt) < max_length:
                    encoded["input_ids"].append([*prompt, *learnt][:max_length])
                    encoded["labels"].append([*unlearnt, *learnt][:max_length])
            return encoded

        rows = self._rows.dataset
        encoded = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
        if not len(encoded):
            raise ConfigError(
                f"the prompts of all {len(rows)} rows of {self._name} fill recovery.max_length={max_length} tokens: "
                "raise it"
            )
        if left_out := len(rows) - len(encoded):
            log.warning("%d rows of %s have prompts of recovery.max_length tokens or more: left out",
                left_out, self._name)  # fmt: skip
        return encoded

    def _prompt(self, row: Mapping[str, Any]) -> str:
        columns = self._columns
        given = row[columns.input_column] if columns.input_column else ""
        template = _WITH_INPUT if given else _WITHOUT_INPUT
        return template.format(instruction=row[columns.instruction_column], input=given)

    def _answer(self, row: Mapping[str, Any]) -> str:
        columns = self._columns
        right = row[columns.label_column] if columns.label_column else 0
        return row[columns.output_columns[right]]

    def _check(self, rows: datasets.Dataset) -> None:
        columns, where = self._columns, f"'{self._columns.split}' of {self._name}"
        if not len(rows):
            raise ConfigError(f"{where} has no rows to learn from")
        texts = [("instruction_column", columns.instruction_column)]
        texts += [("input_column", columns.input_column)] if columns.input_column else []
        texts += [("output_columns", name) for name in columns.output_columns]
        labels = [("label_column", columns.label_column)] if columns.label_column else []
        for key, column in [*texts, *labels]:
            if column not in rows.column_names:
                raise ConfigError(
                    f"the rows of {where} have no column '{column}'{did_you_mean(column, rows.column_names)} "
                    f"(they have {', '.join(rows.column_names)}): set recovery.sets.{self._name}.{key}"
                )
        for _, column in texts:
            for value in rows[column]:
                if not isinstance(value, str):
                    raise ConfigError(f"column '{column}' of {where} holds {value!r}, which is no text")
        legal = range(len(columns.output_columns))
        for _, column in labels:
            for label in rows[column]:
                if label not in legal:
                    raise ConfigError(f"column '{column}' of {where} holds {label!r}; legal are 0 to {legal[-1]}")
