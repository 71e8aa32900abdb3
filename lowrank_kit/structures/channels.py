"""MLP channels: an MLP becomes narrower where that costs less than the ranks of its matrices."""

from typing import Literal

from lowrank_kit.allocations.allocation import Allocation
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.units import Units, channels_of
from lowrank_kit.structures.structure import Structure
from lowrank_kit.truncations.truncation import Truncation


class Channels(Structure):
    """Rows of gate and up, and columns of down: what stays is a stock MLP of another width, without a second product.

    The order of elimination and its cost are `spectral.eliminate`'s, in the units of the truncation's tails; the
    allocation's one multiplier chooses, block by block, between a width and three ranks. Widths are multiples of
    ``method.rank_multiple``.
    """

    kind: Literal["channels"] = "channels"
    """Marks the structure."""

    def check(self, truncation: Truncation, allocation: Allocation) -> None:
        """See `Structure`: losses of channels and of ranks have to be in the same units, and be added up."""
        if not truncation.of_loss:
            raise ConfigError(
                "method.structure=channels compares what channels and ranks cost the loss, and the truncation "
                f"{truncation.kind} measures each matrix by its own outputs: use truncation=two_sided"
            )
        if not allocation.adds_losses:
            raise ConfigError(
                f"method.structure=channels needs a rule that adds up losses, which the allocation {allocation.kind} "
                "does not: use allocation=lagrangian or allocation=loss"
            )

    def units(self, layout: ModelLayout, refs: tuple[LinearRef, ...]) -> tuple[Units, ...]:
        """See `Structure`."""
        found = tuple(units for units in channels_of(layout) if set(units.linears) <= set(refs))
        if not found:
            raise ConfigError(
                f"method.structure=channels finds no MLP of separate matrices among the roles "
                f"{', '.join(dict.fromkeys(ref.role for ref in refs))} of this {layout.model_type}: method.structure="
                "none, or compress every role of its MLPs (method.roles)"
            )
        return found
