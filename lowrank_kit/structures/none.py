"""No structure: matrices lose rank, and nothing else."""

from typing import Literal

from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.units import Units
from lowrank_kit.structures.structure import Structure


class RankAlone(Structure):
    """Every matrix keeps its shape."""

    kind: Literal["none"] = "none"
    """Marks the structure."""

    def units(self, layout: ModelLayout, refs: tuple[LinearRef, ...]) -> tuple[Units, ...]:
        """See `Structure`."""
        return ()
