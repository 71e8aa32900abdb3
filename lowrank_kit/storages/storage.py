"""What a storage is: the price of a rank, and the module that a low-rank matrix becomes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_kit.config import Choice
from lowrank_kit.spectral.factors import LowRankFactors

if TYPE_CHECKING:
    from torch import nn


class Storage(Choice):
    """A storage's settings; their fields are the keys of ``conf/storage/NAME.yaml``.

    What it puts in a linear's place is a `LowRankLinear`, or a kind of it: two plain linears, ``down`` and ``up``,
    that are trained, quantised and adapted like any other.
    """

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """Parameters of a matrix ``[rows, columns]`` of this rank; more for every rank up to the smaller side."""
        raise NotImplementedError

    def put(self, model: "nn.Module", names: Sequence[str], factors: LowRankFactors) -> None:
        """Put a product in a linear's place, or one that is a stack ``[n out, in]`` in the places of n linears.

        Raises as `replace_linear`.
        """
        raise NotImplementedError

    def outline(self, model: "nn.Module", name: str, rank: int) -> None:
        """Give a linear the form that `put` gives it alone, without any values: its weights come from elsewhere."""
        raise NotImplementedError
