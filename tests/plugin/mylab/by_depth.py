"""Ranks that rise with depth: the first blocks lose most."""

from typing import Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation
from lowrank_kit.allocations.budget import proportional


class ByDepth(Allocation):
    """Keep ``1 + slope * depth`` times as much of a matrix, depth from 0 in the first block to 1 in the last."""

    kind: Literal["by_depth"] = "by_depth"
    """Marks the rule."""
    slope: float = Field(default=1.0, ge=0)
    """0 is the uniform allocation."""

    def ranks(self, candidates, budget, probe=None):
        """See `Allocation`."""
        last = max(1, *(candidate.block for candidate in candidates))
        weights = [candidate.dense_cost * (1 + self.slope * candidate.block / last) for candidate in candidates]
        return proportional(candidates, budget, weights)
