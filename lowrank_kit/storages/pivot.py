"""Pivot rows: k rows of the matrix as they are, and every other row by its coefficients for them (PIFA)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lowrank_kit.deferred import torch
from lowrank_kit.models.factored import replace_by_pivots, share_down
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.pivots import PivotFactors, pivoted
from lowrank_kit.storages.storage import Storage

if TYPE_CHECKING:
    from torch import nn


class Pivot(Storage):
    """``down [k, in]`` and ``up [out - k, k]``: ``k (out + in - k)`` parameters, never more than the dense matrix.

    The same matrix as by two factors (`spectral.pivots`; PIFA, arXiv 2501.19090, section 3), and an index of its rows,
    which is no parameter: 4 bytes an output.
    """

    kind: Literal["pivot"] = "pivot"
    """Marks the storage."""

    def cost(self, rows: int, columns: int, rank: int) -> int:
        """See `Storage`."""
        return rank * (rows + columns - rank)

    def put(self, model: "nn.Module", names: Sequence[str], factors: LowRankFactors) -> None:
        """See `Storage`; the members of a stack share the rows of all."""
        members = pivoted(factors).split(factors.shape[0] // len(names))
        for name, member in zip(names, members, strict=True):
            replace_by_pivots(model, name, member)
        for name in names[1:]:
            share_down(model, name, names[0])

    def outline(self, model: "nn.Module", name: str, rank: int) -> None:
        """See `Storage`."""
        weight = weight_of(model.get_submodule(name))
        out_features, in_features = weight.shape
        rows, coefficients = weight.new_empty(rank, in_features), weight.new_empty(out_features - rank, rank)
        index = torch.arange(out_features, device=weight.device)
        replace_by_pivots(model, name, PivotFactors(rows, coefficients, index))
