"""Instructions and their answers, as token sequences whose labels are the answers alone.

They are asked in the Alpaca format, or as a benchmark asks them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lowrank_kit.config import Benchmark, InstructionSet
from lowrank_kit.data.benchmarks import Questions, in_lm_evals_columns
from lowrank_kit.data.encode import check_texts
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.data.sources import DatasetRef, Rows, Source, content_hash
from lowrank_kit.data.special_tokens import Opening, opening_of, plain_ids
from lowrank_kit.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Example:
    """One instruction as the model reads it, and the answer to learn.

    ``continues``: the answer is more of the same text, as a benchmark of likelihoods scores it, with no end behind it;
    otherwise it stands by itself and the end of text is learnt too. ``learns_prompt``: so is the prompt.
    """

    prompt: str
    answer: str
    continues: bool = False
    learns_prompt: bool = False


Ask = Callable[[Questions], Sequence[Example]]
"""Puts rows into the words of their benchmark (`InstructionSet.lm_eval`)."""


class Instructions:
    """The rows of one instruction set, loaded and checked once.

    ``key`` is where the configuration holds the set. Raises `ConfigError` for a set that the source lacks, columns
    that the rows lack and values that are no text.
    """

    def __init__(self, name: str, columns: InstructionSet, source: Source, key: str = "recovery.sets") -> None:
        self.name, self._columns, self._key = name, columns, f"{key}.{name}"
        rows = source.load(instructions_ref(name, columns), columns.split)
        self._check_columns(rows.dataset, columns.only)
        if columns.only:
            chosen = rows.dataset.filter(
                lambda *values: values == tuple(columns.only.values()), input_columns=list(columns.only)
            )
            rows = replace(rows, dataset=chosen, sha256=content_hash(chosen), note=f"only {columns.only}", file=None)
        if not len(rows.dataset):
            raise ConfigError(f"{self._where} has no rows to learn from")
        if columns.lm_eval is None:
            self._check(rows)
        self.rows: Rows = self._short(rows)

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size, for the manifest."""
        return {f"{self.name}:{self._columns.split}": self.rows.facts()}

    def questions(self, rows: datasets.Dataset) -> Questions | None:
        """Some rows as their benchmark's questions; None for a set that is asked in the Alpaca format."""
        columns = self._columns
        if columns.lm_eval is None:
            return None
        benchmark = Benchmark(
            task=columns.lm_eval, dataset=self.name, split=columns.split, metrics=("acc",), columns=columns.columns,
            reason="The rows that are learnt from.",
        )  # fmt: skip
        found = replace(self.rows, dataset=rows, sha256=content_hash(rows))
        return Questions(self.name, benchmark, in_lm_evals_columns(found, benchmark), None)

    def examples(self, rows: datasets.Dataset, ask: Ask | None = None) -> Sequence[Example]:
        """Some rows in words, in their order. Raises what ``ask`` raises, which sets of a benchmark need."""
        questions = self.questions(rows)
        if questions is None:
            learns_prompt = self._columns.learn_prompt
            return [Example(self._prompt(row), self._answer(row), learns_prompt=learns_prompt) for row in rows]
        if ask is None:
            raise ConfigError(f"{self._key}.lm_eval is for what a task learns: task.instructions, not recovery.sets")
        return ask(questions)

    @property
    def _where(self) -> str:
        return f"'{self._columns.split}' of {self.name}"

    def _short(self, rows: Rows) -> Rows:
        most = self._columns.max_characters
        if most is None:
            return rows
        asked = self._columns.instruction_column
        short = rows.dataset.filter(lambda row: len(f"{row[asked]} {self._answer(row)}") <= most)
        if not len(short):
            raise ConfigError(f"{self._where} has no row of at most {self._key}.max_characters={most}: raise it")
        note = f"{len(short)} of {len(rows.dataset)} rows, of at most {most} characters"
        return replace(rows, dataset=short, sha256=content_hash(short), note=note, file=None)

    def _prompt(self, row: Mapping[str, Any]) -> str:
        columns = self._columns
        if columns.prompt is not None:
            return columns.prompt.replace("{instruction}", row[columns.instruction_column])
        given = row[columns.input_column] if columns.input_column else ""
        template = _WITH_INPUT if given else _WITHOUT_INPUT
        return template.format(instruction=row[columns.instruction_column], input=given)

    def _answer(self, row: Mapping[str, Any]) -> str:
        columns = self._columns
        right = row[columns.label_column] if columns.label_column else 0
        return row[columns.output_columns[right]]

    def _check(self, found: Rows) -> None:
        columns, where = self._columns, self._where
        texts = [("instruction_column", columns.instruction_column)]
        texts += [("input_column", columns.input_column)] if columns.input_column else []
        texts += [("output_columns", name) for name in columns.output_columns]
        labels = [("label_column", columns.label_column)] if columns.label_column else []
        for key, column in [*texts, *labels]:
            self._check_columns(found.dataset, [column], key)
        for _, column in texts:
            check_texts(found, column, f"column '{column}' of {where}")
        legal = range(len(columns.output_columns))
        for _, column in labels:
            for number, label in enumerate(found.dataset[column][:]):
                if not isinstance(label, int) or isinstance(label, bool) or label not in legal:
                    raise ConfigError(
                        f"{found.place(number)}: column '{column}' of {where} holds {label!r}; legal are 0 to "
                        f"{legal[-1]}, the numbers of output_columns"
                    )

    def _check_columns(self, rows: datasets.Dataset, columns: Iterable[str], key: str = "only") -> None:
        for column in columns:
            if column not in rows.column_names:
                raise ConfigError(
                    f"the rows of {self._where} have no column '{column}'{did_you_mean(column, rows.column_names)} "
                    f"(they have {', '.join(rows.column_names)}): set {self._key}.{key}"
                )


def instructions_ref(name: str, columns: InstructionSet) -> DatasetRef:
    """Where the rows of a set are."""
    return DatasetRef(name, columns.hub_path, columns.hub_name)


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    of: str,
    key: str,
    train_on_prompt: bool = False,
    opening: Opening | None = None,
) -> datasets.Dataset:
    """BOS, prompt, answer and end of text as ``input_ids``, cut at ``max_length``; prompt tokens have no label.

    An example that `continues` its prompt is tokenised in one piece, as lm-eval does, and has no end. ``opening`` says
    whether BOS comes first; None: as the tokenizer does it. Of what a tokenizer would put behind a text there is
    nothing but the one end behind the answer. An example whose prompt alone fills ``max_length``, which is ``key`` of
    the configuration, and one that has no answer and no end, has nothing to learn and is left out. Raises
    `ConfigError`, with ``of`` for the set's name, where that is every one.
    """
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    tokens = _tokens(examples, tokenizer, opening or opening_of("auto", tokenizer))
    for example, (prompt, answer) in zip(examples, tokens, strict=True):
        if len(prompt) < max_length and answer:
            asked = prompt if train_on_prompt or example.learns_prompt else [NOT_PREDICTED] * len(prompt)
            encoded["input_ids"].append([*prompt, *answer][:max_length])
            encoded["labels"].append([*asked, *answer][:max_length])
    found = datasets.Dataset.from_dict(encoded)
    if not len(found):
        raise ConfigError(f"the prompts of all {len(examples)} rows of {of} fill {key}={max_length} tokens: raise it")
    if left_out := len(examples) - len(found):
        log.warning(
            "%d rows of %s have prompts of %s=%d tokens or more, or no answer: left out", left_out, of, key, max_length
        )
    return found


def _tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, opening: Opening
) -> Iterator[tuple[list[int], list[int]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # As in lm-eval, spaces at the prompt's end belong to the answer.
    prompts = [example.prompt.rstrip() if example.continues else example.prompt for example in examples]
    wholes = iter(
        opening.encode([example.prompt + example.answer for example in examples if example.continues], tokenizer)
    )
    answers = iter(plain_ids([example.answer for example in examples if not example.continues], tokenizer))
    for example, prompt in zip(examples, opening.encode(prompts, tokenizer), strict=True):
        if example.continues:
            whole = next(wholes)
            yield whole[: len(prompt)], whole[len(prompt) :]
        else:
            answer = next(answers)
            # One that is written out at the answer's end is the end.
            yield prompt, answer if end and answer[-1:] == end else answer + end
