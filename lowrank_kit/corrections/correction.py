"""What a correction is: how the planned factors come into the model."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import Choice
from lowrank_kit.deferred import Tensor
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.models.linear import set_weight
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.rounded import round_linear, round_product
from lowrank_kit.models.units import Units
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.factors import LowRankFactors
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

    A correction hands what it has made of a matrix to `put` or `round`, so that later ones see what is stored.
    """

    model: "PreTrainedModel"
    plan: Plan
    decomposition: Decomposition
    samples: CalibrationSamples
    folder: Path | None = None
    """Where finished blocks are kept for a killed run to go on from; None: nowhere."""
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

    @property
    def made_of(self) -> str:
        """A digest of what the factors are made of: the plan, the decomposition, the model; and how they are stored."""
        storage = self.storage.model_dump(mode="json")
        facts = json.dumps([asdict(self.plan), self.decomposition.store.key.digest, storage], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def put(self, names: Sequence[str], factors: LowRankFactors) -> None:
        """Put a product in the place of a linear, or of several that share its ``down``, as it is to be stored."""
        if (bits := self.plan.bits.get(names[0])) is None:
            self.storage.put(self.model, names, factors)
        else:
            round_product(self.model, names[0], factors, self.storage.roundings[bits])

    def round(self, name: str) -> None:
        """Round a linear that is left dense, if that is planned."""
        if (bits := self.plan.bits.get(name)) is not None:
            round_linear(self.model, name, self.storage.roundings[bits])

    def outline(self, refs: Iterable[LinearRef]) -> None:
        """Give linears of a block on disk the form that they have there, without any values."""
        for ref in refs:
            if (units := self.narrowed.get(ref.name)) is None:
                self._outline(ref)
            elif ref.writes_residual:
                keep_units(self.model, units, self.plan.kept[units.name])

    def _outline(self, ref: LinearRef) -> None:
        rank = self.plan.ranks[ref.name]
        if rank < ref.full_rank:
            self.storage.outline(self.model, ref.name, rank)
        parts = [ref.name] if rank == ref.full_rank else [f"{ref.name}.down", f"{ref.name}.up"]
        if (bits := self.plan.bits.get(ref.name)) is not None:
            for part in parts:
                round_linear(self.model, part, self.storage.roundings[bits])


class Correction(Choice):
    """A correction's settings; their fields are the keys of ``conf/correction/NAME.yaml``."""

    default: ClassVar[str | None] = "none"
    trains: ClassVar[bool] = False
    """It trains what it has replaced, which whole numbers cannot be."""

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation, or linears, that it does not go with."""

    def factorise(self, work: Factorisation) -> None:
        """Replace every matrix of lower planned rank by its factors as stored, and narrow MLPs as planned, in place."""
        raise NotImplementedError
