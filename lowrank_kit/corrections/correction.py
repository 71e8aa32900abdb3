"""What a correction is: how the planned factors come into the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import Choice
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.plan import Plan
from lowrank_kit.storages.storage import Storage
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.truncations.decompose import Decomposition
from lowrank_kit.truncations.truncation import Truncation

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Factorisation:
    """What there is to factorise, and by which means: the original model, changed in place, and its decomposition.

    A correction hands what it has made of a matrix to ``storage.put``, so that later ones see what is stored.
    """

    model: "PreTrainedModel"
    plan: Plan
    decomposition: Decomposition
    samples: CalibrationSamples
    progress: "Progress | None" = None
    storage: Storage = field(default_factory=Factors)


class Correction(Choice):
    """A correction's settings; their fields are the keys of ``conf/correction/NAME.yaml``."""

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation, or linears, that it does not go with."""

    def factorise(self, work: Factorisation) -> None:
        """Replace every matrix whose planned rank is below full by its factors as they are stored, in place."""
        raise NotImplementedError
