"""What a compressed model learns: the task's instructions, a set of its own, or the windows it was calibrated on."""

from typing import Any

import datasets

from lowrank_kit.config import RecoveryConfig
from lowrank_kit.data.instructions import Ask, Instructions, encode
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import Source
from lowrank_kit.data.special_tokens import Opening
from lowrank_kit.data.task_texts import TaskTexts
from lowrank_kit.errors import ConfigError


class RecoveryRows:
    """The rows of ``recovery.data``, loaded and checked once.

    ``seed`` draws their order, and which ``train_samples`` of them are read (None: all). Raises `ConfigError` for a set
    that the source lacks, and what `Instructions` raises.
    """

    def __init__(
        self,
        settings: RecoveryConfig,
        texts: TaskTexts,
        source: Source,
        *,
        seed: int,
        train_samples: int | None = None,
    ) -> None:
        self._settings, self._texts, self._seed, self._most = settings, texts, seed, train_samples
        self._instructions = _instructions(settings, source)

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of a set of its own, for the manifest."""
        return self._instructions.facts() if self._instructions else {}

    def opening(self, reader: Reader) -> Opening:
        """What begins the rows: windows are those calibrated on, instructions are asked as in evaluation."""
        is_text = self._texts.instructions is None and self._instructions is None
        return self._texts.opening("calibration" if is_text else "eval", reader)

    def rows(self, reader: Reader, ask: Ask) -> datasets.Dataset:
        """``input_ids`` and ``labels``.

        Raises `ConfigError` where the text is too short, a row is longer than the model reads, or no row is left.
        """
        settings = self._settings
        if self._texts.instructions is not None:
            return self._texts.instructions.train(reader, ask)
        if self._instructions is None:
            windows = self._texts.calibration(reader).tolist()
            rows = datasets.Dataset.from_dict({"input_ids": windows, "labels": windows})
        else:
            reader.check_length("recovery.max_length", settings.max_length)
            rows = encode(
                self._instructions.examples(self._instructions.rows.dataset),
                reader.tokenizer,
                settings.max_length,
                of=settings.data,
                key="recovery.max_length",
                train_on_prompt=settings.train_on_prompt,
                opening=self.opening(reader),
            )
            reader.check_embedded(rows["input_ids"], settings.data)
        return rows.shuffle(seed=self._seed).select(range(min(self._most or len(rows), len(rows))))


def _instructions(settings: RecoveryConfig, source: Source) -> Instructions | None:
    if settings.instructions is None:
        return None
    try:
        return Instructions(settings.data, settings.instructions, source)
    except ConfigError as error:
        raise ConfigError(
            f"recovery.data={settings.data}: {error}. Without instructions: recovery.data=text"
        ) from error
