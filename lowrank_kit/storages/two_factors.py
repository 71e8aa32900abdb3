"""Two factors: what every truncation is made of."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lowrank_kit.models.factored import replace_linear, share_down
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.rounding import Rounding
from lowrank_kit.storages.storage import Storage

if TYPE_CHECKING:
    from torch import nn


class Factors(Storage):
    """``up [out, k]`` and ``down [k, in]``: ``k (out + in)`` parameters, above break-even more than a dense matrix.

    With `bits`, the budget is in bytes, and every matrix gets the rank and the bits, of its factors or of itself, that
    lose least for theirs.
    """

    kind: Literal["factors"] = "factors"
    """Marks the storage."""
    # Left out where they say nothing, so that older run directories are found again.
    bits: tuple[Literal[4, 8], ...] = Field(default=(), exclude_if=lambda bits: not bits)
    """Bits that weights may have beside those of the model's `dtype`: whole numbers of 4 or 8 bits times a scale. With
    any, `method.ratio` is the share of the bytes that is removed."""
    group: int = Field(default=32, ge=2, exclude_if=lambda group: group == 32)
    """Inputs with one scale, of 4 bits; 8 bits have one for every output."""

    @property
    def roundings(self) -> Mapping[int, Rounding]:
        """See `Storage`."""
        return {bits: Rounding(bits, self.group if bits == 4 else 0) for bits in self.bits}

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """See `Storage`."""
        return rank * (rows + columns)

    def put(self, model: "nn.Module", names: Sequence[str], factors: LowRankFactors) -> None:
        """See `Storage`; the members of a stack share one ``down``."""
        for name, up in zip(names, factors.up.chunk(len(names)), strict=True):
            replace_linear(model, name, LowRankFactors(up, factors.down))
        for name in names[1:]:
            share_down(model, name, names[0])

    def outline(self, model: "nn.Module", name: str, rank: int) -> None:
        """See `Storage`."""
        weight = weight_of(model.get_submodule(name))
        out_features, in_features = weight.shape
        up, down = (weight.new_empty(shape) for shape in ((out_features, rank), (rank, in_features)))
        replace_linear(model, name, LowRankFactors(up, down))
