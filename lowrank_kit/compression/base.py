"""A compressor at work on a model: what every kind of compression does in the stages of a run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from jaxtyping import Int64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.methods.base import Compressor, Plan
from lowrank_kit.models.layout import ModelLayout

AnyCompressor = TypeVar("AnyCompressor", bound=Compressor)


@dataclass(frozen=True)
class Workbench:
    """What a compressor works with.

    ``samples`` are calibration windows of equal length, read ``batch_size`` at a time; ``probe_windows`` the held-out
    ones that ``method.probe`` asks for. ``cache`` is the folder of the content-keyed cache, None: nothing is kept.
    """

    model: PreTrainedModel
    layout: ModelLayout
    samples: CalibrationSamples
    batch_size: int
    cache: Path | None = None
    probe_windows: Int64[Tensor, "windows tokens"] | None = None


class Compression(ABC, Generic[AnyCompressor]):
    """One compressor and one original model. A stage may be the first of its process: it makes what it needs."""

    def __init__(self, method: AnyCompressor, bench: Workbench) -> None:
        self.method, self.bench = method, bench

    @abstractmethod
    def calibrate(self, progress: Progress | None = None) -> None:
        """Collect what `plan` reads, in the cache if there is one. The model is left as it was."""

    @abstractmethod
    def plan(self, progress: Progress | None = None) -> Plan:
        """Decide what is kept, within the budget. The model is left as it was."""

    @abstractmethod
    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Return the compressed model; the original may have been changed into it."""

    def plot(self, plan: Plan, folder: Path) -> None:
        """Draw what `plan` saw and decided into an existing folder."""
