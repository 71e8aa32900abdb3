"""LEMS: every matrix's tail in units of its measured divergence, weighted by depth, and one integer program."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Budget, Candidate, MeasuredAllocation, Probe
from lowrank_kit.allocations.budget import (
    Options,
    finish,
    floor_at_break_even,
    losses_at,
    options_of,
    saving_per_parameter,
)
from lowrank_kit.allocations.knapsack import solve
from lowrank_kit.errors import LowRankKitError


class Lems(MeasuredAllocation):
    """The minimum under the budget of ``sum_i w(depth_i) s_i tail_i(k_i)``.

    ``s_i`` is what one measurement of the matrix gives: KL(dense || cut) a token with that matrix alone cut to a share
    `probe_at` of break-even, over its tail there. ``w = 1 + strength (1 - depth)^power``, depth from 0 in the first
    block to 1 in the last; every pair of `strength` and `power` gives a plan, and of these the one under which the
    whole model has the least KL stands. A RECONSTRUCTION of the allocation of LEMS (ICML 2026) from a description: the
    values of the curve's two parameters are ours, ten trials in all as there.
    """

    crosses_roles: ClassVar[bool] = True

    kind: Literal["lems"] = "lems"
    """Marks the rule."""
    probe_at: float = Field(default=0.1, gt=0, lt=1)
    """Share of break-even that a matrix is cut to for its measurement."""
    floor: float = Field(default=0.3, ge=0, le=1)
    """No rank below this share of break-even; 0.1 is theirs at hard ratios."""
    strength: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 3.0, 9.0)
    """Extra weights of the first block to try, beside none at all."""
    power: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 4.0)
    """How fast these fall to none at the last one."""

    def check(self, candidates: Sequence[Candidate], budget: Budget) -> None:
        """Raise `ConfigError` where the floor costs more than the budget."""
        options_of(candidates, floor_at_break_even(candidates, budget, self.floor))

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`. Also a `LowRankKitError` where no matrix's cut is measurable."""
        assert probe is not None
        options = options_of(candidates, floor_at_break_even(candidates, budget, self.floor))
        tails = [losses_at(c.tail, o) for c, o in zip(candidates, options, strict=True)]
        scales = self._scales(candidates, budget, probe)
        depth = max(1, *(c.block for c in candidates))
        curves = [(0.0, 1.0), *((strength, power) for strength in self.strength for power in self.power)]
        plans = []
        for strength, power in curves:
            weights = [
                s * (1 + strength * (1 - c.block / depth) ** power) for s, c in zip(scales, candidates, strict=True)
            ]
            losses = [[weight * x for x in tail] for weight, tail in zip(weights, tails, strict=True)]
            plans.append(self._solved(candidates, budget, options, losses))
        return min(plans, key=probe.divergence)

    def _scales(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe) -> list[float]:
        """Measured divergence over predicted loss, by candidate; what cannot be measured has the mean of the others."""
        found: list[float | None] = []
        for candidate, options in zip(candidates, options_of(candidates, replace(budget, floor=0.0)), strict=True):
            rank = options.ranks[options.within(candidate.cost(candidate.break_even) * self.probe_at)]
            predicted = float(candidate.tail[rank:].sum())
            measured = probe.divergence({candidate.name: rank})
            found.append(measured / predicted if predicted > 0 and measured > 0 else None)
        known = [scale for scale in found if scale is not None]
        if not known:
            raise LowRankKitError(
                f"cutting any of {len(found)} matrices to {self.probe_at:g} of break-even changed no prediction, so "
                "nothing can be calibrated; measure on more text or cut deeper (method.allocation.probe_at)"
            )
        return [sum(known) / len(known) if scale is None else scale for scale in found]

    def _solved(
        self,
        candidates: Sequence[Candidate],
        budget: Budget,
        options: Sequence[Options],
        losses: Sequence[Sequence[float]],
    ) -> dict[str, int]:
        chosen = solve([o.costs for o in options], losses, budget.parameters)
        urgency = saving_per_parameter(options, losses)
        return finish(candidates, budget, options, chosen, urgency)
