"""D-Rank: ranks by the effective rank of the whitened spectrum, then from q and k to v (arXiv 2509.25622)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import keep_of, options_of, proportional, share_out
from lowrank_kit.models.architectures import Product
from lowrank_kit.spectral.metrics import effective_rank
from lowrank_kit.truncations.spectra import Spectrum, Whitened

ATTENDING: frozenset[Product] = frozenset({"query", "key", "value"})


class DRank(Allocation):
    """``k = const * sqrt(R / (out + in))``, the minimum of ``sum R / k`` under the budget.

    R is the effective rank, of the squared singular values of the whitened matrix. Then `moved` of the parameters of
    every q and k are pooled and shared evenly among the v; what a v cannot take below its own dense cost goes back to
    q and k, in proportion to what they gave. Checked against the authors' code (Rainbow0427/D_rank), its branch
    for Llama 1-2 and that for grouped queries (Llama 3, Mistral). Both keep some roles at uniform ranks (`guard`).
    Theirs lets a v cost more than its dense matrix; here what is above goes back too. A merged qkv has nothing to move.
    """

    crosses_roles: ClassVar[bool] = True

    kind: Literal["d_rank"] = "d_rank"
    """Marks the rule."""
    scope: Literal["role", "global"] = "role"
    """Normalise the constant within each role, or once for all."""
    moved: float = Field(default=0.3, ge=0, lt=1)
    """Share of q's and k's parameters that v gets. The paper: 0.3 to 0.4; the authors' code: 0.2, grouped 0.1."""
    guard: bool = True
    """As in the authors' code: gate keeps uniform ranks, and so does a role whose whitened loss they make smaller; q, k
    and v do not take part in that comparison, but with grouped queries q and k stay uniform and v does take part."""

    def needs(self) -> frozenset[Spectrum]:
        """The whitened spectrum."""
        return frozenset({Whitened()})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        # The parameters of a rank that goes with the root of R over what one costs.
        density = [(effective_rank(c.spectra["whitened"]) * c.first_rank_cost) ** 0.5 for c in candidates]
        groups = [c.role if self.scope == "role" else "all" for c in candidates]
        weights = share_out(density, groups, [c.dense_cost for c in candidates])
        if self.guard:
            weights = self._guarded(candidates, weights, keep_of(candidates, budget))
        found = proportional(candidates, budget, weights)
        if not self.moved or not {c.product for c in candidates} >= ATTENDING:
            return found
        return proportional(candidates, budget, self._rebalanced(candidates, budget, found))

    def _guarded(self, candidates: Sequence[Candidate], weights: Sequence[float], keep: float) -> list[float]:
        """The weights, uniform for every role that the authors' code keeps so."""
        uniform, even = [float(candidate.dense_cost) for candidate in candidates], set()
        rows = {c.product: c.shape[0] for c in candidates}
        grouped = {"query", "value"} <= rows.keys() and rows["value"] < rows["query"]
        fixed: frozenset[Product] = frozenset({"gate", "query", "key"} if grouped else {"gate"})
        for role in {c.role for c in candidates if c.product not in fixed | (frozenset() if grouped else ATTENDING)}:
            members = [i for i, c in enumerate(candidates) if c.role == role]
            dynamic, static = (
                sum(self._loss(candidates[i], keep * parameters[i]) for i in members)
                for parameters in (weights, uniform)
            )
            if dynamic >= static:
                even.add(role)
        return [
            same if c.product in fixed or c.role in even else weight
            for c, weight, same in zip(candidates, weights, uniform, strict=True)
        ]

    def _loss(self, candidate: Candidate, parameters: float) -> float:
        """What is lost where the matrix keeps so many."""
        return float(candidate.spectra["whitened"][round(candidate.rank_at(parameters)) :].sum())

    def _rebalanced(self, candidates: Sequence[Candidate], budget: Budget, found: dict[str, int]) -> list[float]:
        """Weights after q and k gave to v, as far as v could take it."""
        cost = [float(c.cost(found[c.name])) for c in candidates]
        caps = [options.costs[-1] for options in options_of(candidates, budget)]
        of: dict[Product, list[int]] = defaultdict(list)
        for i, candidate in enumerate(candidates):
            of[candidate.product].append(i)
        givers: tuple[Product, ...] = ("query", "key")
        given = {giver: self.moved * sum(cost[i] for i in of[giver]) for giver in givers}
        offered = sum(given.values()) / len(of["value"])
        taken = 0.0
        for i in of["value"]:
            gain = min(offered, max(caps[i] - cost[i], 0.0))
            cost[i] += gain
            taken += gain
        returned = 1 - taken / sum(given.values())
        for giver, gift in given.items():
            for i in of[giver]:
                cost[i] += returned * gift / len(of[giver]) - self.moved * cost[i]
        return cost
