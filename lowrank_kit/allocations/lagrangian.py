"""Least total tail under the budget: one Lagrange multiplier for the whole model."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import losses_at, options_beside, options_of
from lowrank_kit.allocations.forms import choose_forms
from lowrank_kit.allocations.knapsack import relax
from lowrank_kit.allocations.narrowing import Narrowing, choose


class Lagrangian(Allocation):
    """Every matrix takes the option that minimises ``tail(k) + mu cost(k)``, mu such that the budget is met.

    Tails of different matrices add up only in units they share: with the two-sided metric those of the loss
    (the Kronecker-factored second-order estimate), with the others those of each layer's own output. A tail is
    convex in k but the dense option (no loss, full cost) is not, so a matrix leaps from below break-even to dense.
    Published relatives: KFAC-SVD / LEMS and IO-SVD.
    """

    adds_losses: ClassVar[bool] = True
    chooses_bits: ClassVar[bool] = True

    kind: Literal["lagrangian"] = "lagrangian"
    """Marks the rule."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        return self.ranks_or_channels(candidates, (), budget)

    def ranks_or_channels(
        self,
        candidates: Sequence[Candidate],
        narrowings: Sequence[Narrowing],
        budget: Budget,
        probe: Probe | None = None,
    ) -> dict[str, int]:
        """See `Allocation.ranks_or_channels`."""
        options = [*options_of(candidates, budget), *options_beside(narrowings, candidates, budget)]
        losses = [losses_at(c.tail, o) for c, o in zip([*candidates, *narrowings], options, strict=True)]

        def solver(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[int]:
            return relax(costs, losses, budget.parameters).chosen

        return choose(candidates, narrowings, budget, options, losses, solver)

    def ranks_and_bits(self, forms: Sequence[Sequence[Candidate]], budget: Budget) -> dict[str, tuple[Candidate, int]]:
        """See `Allocation.ranks_and_bits`."""
        return choose_forms(forms, budget)
