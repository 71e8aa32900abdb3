"""Uniform allocation: the same fraction of every matrix, as in SVD-LLM (arXiv 2403.07378)."""

from collections.abc import Sequence
from typing import Literal

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import proportional


class Uniform(Allocation):
    """Every matrix keeps the same fraction of its parameters: with two factors, ``k = keep * out in / (out + in)``."""

    kind: Literal["uniform"] = "uniform"
    """Marks the rule."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`; two equal matrices differ by one step at most."""
        return proportional(candidates, budget, [candidate.dense_cost for candidate in candidates])
