"""Basis Sharing (arXiv 2410.03765): neighbouring layers of one role are written in one common basis."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.deferred import torch
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.truncate import Projection, input_projection
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.truncation import Layer, Truncation


class Joint(Truncation):
    """One shared `down` for the `blocks` neighbouring matrices of a role, an `up` for each.

    Best for the sum of their squared output errors when every member's inputs are taken to have the members' pooled
    second moment, as in the paper. Roles outside `shared` get the optimal truncation of their own.
    """

    kind: Literal["joint"] = "joint"
    """Marks the truncation."""
    blocks: int = Field(default=2, ge=2)
    """Neighbouring blocks that share a basis; the paper's default."""
    shared: tuple[str, ...] | None = None
    """Roles that share; null: all but experts, and those that write to the residual stream, which the paper leaves
    out."""

    @property
    def span(self) -> int:
        """As in `Truncation`."""
        return self.blocks

    def members(self, refs: Sequence[LinearRef]) -> list[tuple[LinearRef, ...]]:
        """As in `Truncation`: one group a shared role, and every other linear alone."""
        groups: dict[str, list[LinearRef]] = defaultdict(list)
        for ref in refs:
            shape = f"{ref.role} {ref.out_features} {ref.in_features}"
            groups[shape if self._shares(ref) else ref.name].append(ref)
        return [tuple(group) for group in groups.values()]

    def _shares(self, ref: LinearRef) -> bool:
        if self.shared is None:
            return not ref.writes_residual and ref.expert is None
        return ref.role in self.shared

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        return StatisticsRequest(moments="smaller")

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`; for several matrices on the input side, so that `down` is common."""
        if len(layers) == 1:
            return Optimal().project(layers)
        moments = [layer.statistics.moments for layer in layers]
        inputs = torch.stack([m.gram for m in moments]).sum(0) / sum(m.count for m in moments)
        weights = [layer.weight.detach().double() for layer in layers]
        return input_projection(inputs, torch.stack([weight.T @ weight for weight in weights]).sum(0))
