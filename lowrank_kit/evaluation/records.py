"""The one form in which every figure leaves the toolkit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_kit.files import read_as

Checkpoint = Literal["dense", "compressed", "early", "best", "final", "majority_class"]


@dataclass(frozen=True)
class EvalRecord:
    """A metric of one task. Fractions, never percent; ``stderr`` in the metric's unit.

    ``checkpoint`` says which state was measured: the model as it came (the reference of a compressed one), a
    compressed one before its recovery, the first evaluation while training, the best one (the highest of several
    on the evaluation split, so an optimistic figure), the end (the figure to quote), or the training set's
    majority class without any model.
    ``n`` counts rows, of a text windows, of a speed repeats, of an average benchmarks. ``bos`` is the token that began
    every window or prompt, empty where none did; None where a tokenizer's own special tokens were read, or no text.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    fewshot: int
    source: str
    versions: Mapping[str, str]
    checkpoint: Checkpoint = "final"
    step: int | None = None
    bos: str | None = None


def read_records(file: Path) -> list[EvalRecord]:
    """Read a run's `results.json`; none where there is no such file. Raises `DamagedFileError`."""
    return list(read_as(file, tuple[EvalRecord, ...]) or ())
