"""Two factors: what every truncation is made of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lowrank_kit.models.factored import replace_linear, share_down
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.storage import Storage

if TYPE_CHECKING:
    from torch import nn


class Factors(Storage):
    """``up [out, k]`` and ``down [k, in]``: ``k (out + in)`` parameters, above break-even more than a dense matrix."""

    kind: Literal["factors"] = "factors"
    """Marks the storage."""

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
