"""What a correction is: how the planned factors come into the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Float

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import Choice
from lowrank_kit.deferred import Tensor
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.models.linear import set_weight
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import Units
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

    @cached_property
    def narrowed(self) -> dict[str, Units]:
        """The MLPs that lose channels, by the names of all their matrices: none of these loses rank."""
        planned = (units for units in self.decomposition.request.units if units.name in self.plan.kept)
        return {ref.name: units for units in planned for ref in units.linears}

    def narrow(self, units: Units, weight: Float[Tensor, "out k"]) -> None:
        """Take the planned channels out of the model, in place; ``weight`` is what reads those that stay."""
        keep_units(self.model, units, self.plan.kept[units.name])
        set_weight(self.model.get_submodule(units.columns[0].name), weight)


class Correction(Choice):
    """A correction's settings; their fields are the keys of ``conf/correction/NAME.yaml``."""

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation, or linears, that it does not go with."""

    def factorise(self, work: Factorisation) -> None:
        """Replace every matrix of lower planned rank by its factors as stored, and narrow MLPs as planned, in place."""
        raise NotImplementedError
