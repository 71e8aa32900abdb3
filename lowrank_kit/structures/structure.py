"""What a structure is: parts of a block that may leave whole, under the same budget as ranks."""

from typing import ClassVar

from lowrank_kit.allocations.allocation import Allocation
from lowrank_kit.config import Choice
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.units import Units
from lowrank_kit.truncations.truncation import Truncation


class Structure(Choice):
    """A structure's settings; their fields are the keys of ``conf/structure/NAME.yaml``."""

    default: ClassVar[str | None] = "none"

    def check(self, truncation: Truncation, allocation: Allocation) -> None:
        """Raise `ConfigError` for a truncation or an allocation that it does not go with."""

    def units(self, layout: ModelLayout, refs: tuple[LinearRef, ...]) -> tuple[Units, ...]:
        """The parts of the model that may become narrower, where all their matrices are among these.

        Raises `ConfigError` where there is none.
        """
        raise NotImplementedError
