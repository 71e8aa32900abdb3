"""All that a run of a causal model reads."""

from dataclasses import dataclass
from typing import Any

from lowrank_kit.config import Method
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.recovery_rows import RecoveryRows
from lowrank_kit.data.task_texts import TaskTexts


@dataclass(frozen=True)
class CausalData:
    """What the task has, and what a compressed model learns from (None: it is not recovered)."""

    texts: TaskTexts
    recovery: RecoveryRows | None = None

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every split, for the manifest."""
        return self.texts.facts() | (self.recovery.facts() if self.recovery else {})

    def check_lengths(self, reader: Reader, method: Method) -> None:
        """Raise `ConfigError` for texts that are too short, and for windows that are longer than the model reads."""
        self.texts.evaluation(reader)
        if method.compresses or (method.calibrates and self.texts.adapters_read_text):
            self.texts.calibration(reader)
        if method.probe is not None:
            self.texts.held_out(method.probe[0], reader, method.probe[1])
