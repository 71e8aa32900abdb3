"""What a correction is: how the planned factors come into the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import Choice
from lowrank_kit.deferred import torch
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.truncations.decompose import Decomposition
from lowrank_kit.truncations.truncation import Truncation

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Factorisation:
    """What there is to factorise, and by which means: the original model, changed in place, and its decomposition."""

    model: "PreTrainedModel"
    plan: Plan
    decomposition: Decomposition
    samples: CalibrationSamples
    folder: Path | None = None
    """Where finished blocks are kept for a killed run to go on from; None: nowhere."""
    progress: "Progress | None" = None

    @property
    def made_of(self) -> str:
        """A digest of what the factors are made of: the plan, the decomposition, the model."""
        facts = json.dumps([asdict(self.plan), self.decomposition.store.key.digest], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def outline(self, ref: LinearRef) -> None:
        """Give a linear that is factored in a block on disk its form, without any values."""
        rank = self.plan.ranks[ref.name]
        device = self.model.get_submodule(ref.name).weight.device
        up, down = (torch.empty(*shape, device=device) for shape in ((ref.out_features, rank), (rank, ref.in_features)))
        replace_linear(self.model, ref.name, LowRankFactors(up, down))


class Correction(Choice):
    """A correction's settings; their fields are the keys of ``conf/correction/NAME.yaml``."""

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation, or linears, that it does not go with."""

    def factorise(self, work: Factorisation) -> None:
        """Replace every matrix whose planned rank is below full by its factors, in place."""
        raise NotImplementedError
