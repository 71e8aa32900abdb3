"""What a storage is: the price of a rank, and the module that a low-rank matrix becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from lowrank_kit.config import Choice
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.rounding import Rounding

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class Price(Protocol):
    """What matrices cost in one form: in parameters, or in bytes."""

    @property
    def rounding(self) -> Rounding | None:
        """What the weights are rounded to; None: nothing."""
        ...

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """Of a matrix ``[rows, columns]`` of this rank; more for every rank up to the smaller side."""
        ...

    def dense_cost(self, rows: int, columns: int) -> int:
        """Of a matrix that is not factored."""
        ...


@dataclass(frozen=True)
class Bytes:
    """A `Price` in bytes of two factors, or of a matrix, as they lie in a file.

    ``itemsize`` is that of the model's number format, in which scales are, too.
    """

    itemsize: int
    rounding: Rounding | None = None

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """See `Price`."""
        return self.dense_cost(rank, columns) + self.dense_cost(rows, rank)

    def dense_cost(self, rows: int, columns: int) -> int:
        """See `Price`."""
        if self.rounding is None:
            return rows * columns * self.itemsize
        return self.rounding.size(rows, columns, self.itemsize)


class Storage(Choice):
    """A storage's settings; their fields are the keys of ``conf/storage/NAME.yaml``.

    It is a `Price` in parameters. What it puts in a linear's place is a `LowRankLinear`, or a kind of it: two plain
    linears, ``down`` and ``up``, that are trained, quantised and adapted like any other.
    """

    default: ClassVar[str | None] = "factors"
    rounding: ClassVar[None] = None

    @property
    def roundings(self) -> Mapping[int, Rounding]:
        """How weights may be rounded, by their bits; where there is any, prices are in bytes."""
        return {}

    def prices(self, itemsize: int) -> tuple[Price, ...]:
        """Of the forms that a matrix may have, that in the model's number format (bytes a weight) first."""
        if not self.roundings:
            return (self,)
        return Bytes(itemsize), *(Bytes(itemsize, rounding) for rounding in self.roundings.values())

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """Parameters of a matrix ``[rows, columns]`` of this rank; more for every rank up to the smaller side."""
        raise NotImplementedError

    def dense_cost(self, rows: int, columns: int) -> int:
        """Parameters of a matrix that is not factored."""
        return rows * columns

    def put(self, model: "nn.Module", names: Sequence[str], factors: LowRankFactors) -> None:
        """Put a product in a linear's place, or one that is a stack ``[n out, in]`` in the places of n linears.

        Raises as `replace_linear`.
        """
        raise NotImplementedError

    def outline(self, model: "nn.Module", name: str, rank: int) -> None:
        """Give a linear the form that `put` gives it alone, without any values: its weights come from elsewhere."""
        raise NotImplementedError
