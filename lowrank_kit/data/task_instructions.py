"""What a causal model learns of a task: rows of its instruction sets, drawn by the seed, some of them held out."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from lowrank_kit.config import Bos, CalibrationConfig, CausalTask, EvalConfig
from lowrank_kit.data.benchmarks import Questions
from lowrank_kit.data.instructions import Ask, Example, Instructions, encode, instructions_ref
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import Source, has
from lowrank_kit.data.task_rows import HELD_OUT_SEED
from lowrank_kit.errors import ConfigError

MAX_LENGTH = "task.max_length"


class TaskInstructions:
    """The instruction sets of a task that the data source has, loaded and checked once, shuffled together.

    Sets marked as fallback take part where the source has none of the others. Raises `ConfigError` for a task without
    instructions, a source that has none of the sets, what `Instructions` raises, and an ``eval.held_out`` that leaves
    nothing. ``seed`` draws the order of the training rows, and which ``train_samples`` of them are read (None: all).
    """

    def __init__(
        self, task: CausalTask, source: Source, settings: EvalConfig, *, seed: int, train_samples: int | None = None
    ) -> None:
        self._task, self._bos = task, settings.bos
        names = _present(task, source)
        self.sets = {name: Instructions(name, task.instructions[name], source, "task.instructions") for name in names}
        """The sets that are learnt from, by name."""
        rows = np.array([(i, j) for i, s in enumerate(self.sets.values()) for j in range(len(s.rows.dataset))])
        held_out = settings.held_out or 0
        if held_out >= len(rows):
            raise ConfigError(
                f"eval.held_out={held_out} leaves nothing to train on: {', '.join(names)} have {len(rows)} rows"
            )
        # Fixed, so that every seed and every method is evaluated on the same held-out rows.
        apart = np.random.default_rng(HELD_OUT_SEED).permutation(rows) if held_out else rows
        self._held_out, rest = apart[:held_out], apart[held_out:]
        self._train = np.random.default_rng(seed).permutation(rest)[:train_samples]

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every set, for the manifest."""
        return {split: fact for instructions in self.sets.values() for split, fact in instructions.facts().items()}

    def train(self, reader: Reader, ask: Ask) -> datasets.Dataset:
        """``input_ids`` and ``labels`` of the training rows, in an order drawn by the seed."""
        return self._encode(self._train, reader, ask, self._bos)

    def calibration(self, reader: Reader, settings: CalibrationConfig, ask: Ask) -> datasets.Dataset:
        """The first training rows, in words as in training but cut to ``calibration.seq_len``."""
        length = min(settings.seq_len, self._task.max_length)
        return self._encode(self._train[: settings.samples], reader, ask, settings.bos, length)

    def held_out(self, reader: Reader, ask: Ask) -> datasets.Dataset | None:
        """The rows that ``eval.held_out`` keeps from training, encoded as those; None without it."""
        return self._encode(self._held_out, reader, ask, self._bos) if len(self._held_out) else None

    def held_out_questions(self) -> dict[str, Questions]:
        """Of the held-out rows those that a benchmark asks, by the names of their sets."""
        found = {}
        for number, (name, instructions) in enumerate(self.sets.items()):
            rows = self._held_out[self._held_out[:, 0] == number, 1]
            if len(rows) and (questions := instructions.questions(instructions.rows.dataset.select(rows))):
                found[name] = questions
        return found

    def _encode(
        self, chosen: np.ndarray, reader: Reader, ask: Ask, bos: Bos, length: int | None = None
    ) -> datasets.Dataset:
        reader.check_length(MAX_LENGTH, self._task.max_length)
        examples: list[Example | None] = [None] * len(chosen)
        for number, instructions in enumerate(self.sets.values()):
            [places] = np.nonzero(chosen[:, 0] == number)
            if len(places):
                rows = instructions.rows.dataset.select(chosen[places, 1])
                for place, example in zip(places, instructions.examples(rows, ask), strict=True):
                    examples[place] = example
        in_order: Sequence[Example] = [example for example in examples if example is not None]
        length = length or self._task.max_length
        opening = reader.opening(bos)
        rows = encode(in_order, reader.tokenizer, length, of=", ".join(self.sets), key=MAX_LENGTH, opening=opening)
        reader.check_embedded(rows["input_ids"], ", ".join(self.sets))
        return rows


def _present(task: CausalTask, source: Source) -> list[str]:
    sets = task.instructions
    if not sets:
        raise ConfigError(f"task={task.name} has nothing to learn from: choose one with task.instructions")
    there = [name for name, s in sets.items() if has(source, instructions_ref(name, s), [s.split])]
    if not there:
        [first, *_] = [name for name, s in sets.items() if not s.fallback] or sets
        try:
            source.load(instructions_ref(first, sets[first]), sets[first].split)
        except ConfigError as error:
            raise ConfigError(
                f"data={source.kind} has none of the sets that task={task.name} learns from ({', '.join(sets)}): "
                f"{error}; or rows of your own, task.instructions.NAME={{}}"
            ) from error
    return [name for name in there if not sets[name].fallback] or there
