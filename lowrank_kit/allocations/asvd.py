"""ASVD's sensitivity-based truncation rank search, STRS (arXiv 2312.05821, section 3.3)."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lowrank_kit.allocations.allocation import Budget, Candidate, MeasuredAllocation, Probe
from lowrank_kit.allocations.budget import Options, finish, options_of, saving_per_parameter
from lowrank_kit.errors import ConfigError


class Strs(MeasuredAllocation):
    """Cut one matrix at a time to every share of a grid, measure, then allow every matrix the same loss.

    With a threshold on the measured loss each matrix takes the smallest share that stays below it, dense if none
    does; a binary search finds the smallest threshold that meets the budget. Checked against the authors' code
    (ASVD4LLM, `sensitivity.py` and `binary_search.py`). Perplexity and loss order alike, so loss is used.
    """

    kind: Literal["asvd"] = "asvd"
    """Marks the rule."""
    grid: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1)
    """Shares of a matrix's parameters to measure, the authors' by default; each costs one measurement a matrix. A ratio
    above 0.6 needs smaller ones."""

    def check(self, candidates: Sequence[Candidate], budget: Budget) -> None:
        """Raise `ConfigError` when even the smallest share costs more than the budget."""
        options = options_of(candidates, budget)
        cheapest = sum(
            o.costs[o.within(min(self.grid) * c.dense_cost)] for c, o in zip(candidates, options, strict=True)
        )
        if cheapest > budget.parameters:
            raise ConfigError(
                f"the smallest share of allocation.grid, {min(self.grid):g}, costs {cheapest} parameters, above "
                f"the budget of {budget.parameters}; add smaller shares"
            )

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`, and `check`."""
        self.check(candidates, budget)
        assert probe is not None
        options = options_of(candidates, budget)
        measured = [self._measure(c, o, probe) for c, o in zip(candidates, options, strict=True)]
        thresholds = sorted({loss for found in measured for loss in found.values()})
        fits = bisect_left(
            thresholds,
            True,
            key=lambda t: sum(o.costs[_cut(f, t)] for o, f in zip(options, measured, strict=True)) <= budget.parameters,
        )
        start = [_cut(found, thresholds[fits]) for found in measured]
        curves = [
            np.interp(o.costs, [o.costs[i] for i in sorted(f)], [f[i] for i in sorted(f)]).tolist()
            for o, f in zip(options, measured, strict=True)
        ]
        return finish(candidates, budget, options, start, saving_per_parameter(options, curves))

    def _measure(self, candidate: Candidate, options: Options, probe: Probe) -> dict[int, float]:
        """Loss change by option's index; the largest option counts as measured where it is dense."""
        dense = {len(options.ranks) - 1: 0.0} if options.ranks[-1] == candidate.full_rank else {}
        indices = {options.within(share * candidate.dense_cost) for share in self.grid} - dense.keys()
        return {i: probe.loss_change({candidate.name: options.ranks[i]}) for i in sorted(indices)} | dense


def _cut(found: dict[int, float], threshold: float) -> int:
    """The smallest measured option whose loss is within the threshold, else the largest."""
    return min((index for index, loss in found.items() if loss <= threshold), default=max(found))
