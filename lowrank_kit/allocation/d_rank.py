"""D-Rank: ranks by the effective rank of the whitened spectrum, then from q and k to v (arXiv 2509.25622)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lowrank_kit.allocation.base import Allocation, Budget, Candidate, Probe, Quantity
from lowrank_kit.allocation.budget import proportional, share_out
from lowrank_kit.spectral.metrics import effective_rank


class DRank(Allocation):
    """``k = const * sqrt(R / (out + in))``, the minimum of ``sum R / k`` under the budget.

    R is the effective rank, of the squared singular values of the whitened matrix. Afterwards `moved` of the
    parameters of q and k in a block go to its v, where a block has all three (a merged qkv has nothing to move).
    The use of the whitened, squared spectrum and the move to v are checked against public summaries of the paper.
    """

    crosses_roles: ClassVar[bool] = True

    kind: Literal["d_rank"] = "d_rank"
    """Marks the rule."""
    scope: Literal["role", "global"] = "role"
    """Normalise the constant within each role, or once for all."""
    moved: float = Field(default=0.3, ge=0, lt=1)
    """Share of q's and k's parameters that v gets; the paper's range is 0.3 to 0.4."""

    def needs(self) -> frozenset[Quantity]:
        """The whitened spectrum."""
        return frozenset({"whitened"})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        density = [(effective_rank(c.spectra["whitened"]) / c.cost_per_rank) ** 0.5 for c in candidates]
        groups = [c.role if self.scope == "role" else "all" for c in candidates]
        weights = share_out(candidates, density, groups, [c.dense_cost for c in candidates])
        found = proportional(candidates, budget, weights)
        if not self.moved:
            return found
        return proportional(candidates, budget, self._rebalanced(candidates, found))

    def _rebalanced(self, candidates: Sequence[Candidate], found: dict[str, int]) -> list[float]:
        cost = [float(c.cost(found[c.name])) for c in candidates]
        blocks: dict[int, dict[str, int]] = defaultdict(dict)
        for index, candidate in enumerate(candidates):
            blocks[candidate.block][candidate.role] = index
        for roles in blocks.values():
            if {"q", "k", "v"} <= roles.keys():
                for giver in (roles["q"], roles["k"]):
                    cost[roles["v"]] += self.moved * cost[giver]
                    cost[giver] -= self.moved * cost[giver]
        return [price / candidate.cost_per_rank for price, candidate in zip(cost, candidates, strict=True)]
