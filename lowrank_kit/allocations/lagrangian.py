"""Least total tail under the budget: one Lagrange multiplier for the whole model."""

from collections.abc import Sequence
from typing import Literal

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import finish, losses_at, options_of, saving_per_parameter
from lowrank_kit.allocations.knapsack import relax


class Lagrangian(Allocation):
    """Every matrix takes the option that minimises ``tail(k) + mu cost(k)``, mu such that the budget is met.

    Tails of different matrices add up only in units they share: with the two-sided metric those of the loss
    (the Kronecker-factored second-order estimate), with the others those of each layer's own output. A tail is
    convex in k but the dense option (no loss, full cost) is not, so a matrix leaps from below break-even to dense.
    Published relatives: KFAC-SVD / LEMS and IO-SVD.
    """

    kind: Literal["lagrangian"] = "lagrangian"
    """Marks the rule."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        options = options_of(candidates, budget)
        losses = [losses_at(c.tail, o) for c, o in zip(candidates, options, strict=True)]
        start = relax([o.costs for o in options], losses, budget.parameters).chosen
        return finish(candidates, budget, options, start, saving_per_parameter(options, losses))
