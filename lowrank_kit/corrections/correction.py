"""What a correction is: how the planned factors come into the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
    folder: Path | None = None
    """Where finished blocks are kept for a killed run to go on from; None: nowhere."""
    progress: "Progress | None" = None
    storage: Storage = field(default_factory=Factors)

    @property
    def made_of(self) -> str:
        """A digest of what the factors are made of: the plan, the decomposition, the model; and how they are stored."""
        storage = self.storage.model_dump(mode="json")
        facts = json.dumps([asdict(self.plan), self.decomposition.store.key.digest, storage], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def outline(self, ref: LinearRef) -> None:
        """Give a linear that is factored in a block on disk its form, without any values."""
        self.storage.outline(self.model, ref.name, self.plan.ranks[ref.name])


class Correction(Choice):
    """A correction's settings; their fields are the keys of ``conf/correction/NAME.yaml``."""

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation, or linears, that it does not go with."""

    def factorise(self, work: Factorisation) -> None:
        """Replace every matrix whose planned rank is below full by its factors as they are stored, in place."""
        raise NotImplementedError
