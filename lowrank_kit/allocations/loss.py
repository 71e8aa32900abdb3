"""Least predicted loss, calibrated by measured loss and solved exactly: this toolkit's own rule."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import exp, log
from statistics import fmean, median
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Budget, Candidate, MeasuredAllocation, Probe
from lowrank_kit.allocations.budget import Options, losses_at, options_beside, options_of
from lowrank_kit.allocations.knapsack import solve
from lowrank_kit.allocations.narrowing import Curves, Narrowing, choose
from lowrank_kit.errors import LowRankKitError


class Loss(MeasuredAllocation):
    """The minimum under the budget of ``sum_i w_i a_g n_g^(b_g - 1) tail_i(k_i)^b_g``.

    g is a role in a range of depth, with n matrices. All matrices of a group are cut to each share of `probes` while
    the rest stays dense, and ``log measured = log a + b log predicted`` is fitted to the group's total (b = 1 with
    one share). ``w = 1 + bias (1 - depth)`` weighs early blocks, whose errors pass through all later ones. The options
    (rank multiples and dense) form a multiple-choice knapsack, solved exactly by HiGHS. Each bias gives a plan, the
    tails as they are one more; the whole model is measured under every plan and the best one stands.

    A relative: LEMS (ICML 2026) scales tails by one measurement a matrix, weighs depth likewise and solves an integer
    program; checked against the authors' code.
    """

    crosses_roles: ClassVar[bool] = True
    adds_losses: ClassVar[bool] = True

    kind: Literal["loss"] = "loss"
    """Marks the rule."""
    probes: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.7, 0.4), min_length=1)
    """Shares of its parameters that a group is cut to, one measurement each."""
    depth_ranges: int = Field(default=3, ge=1)
    """Ranges of neighbouring blocks that groups are made of."""
    limit: float = Field(default=10.0, ge=1)
    """Measured-to-predicted ratios are kept within this factor of their median: single ones can be noise."""
    depth_bias: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 1.0, 3.0), min_length=1)
    """Extra weights of the first block to try, falling linearly to none at the last; one measurement each."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`. Also a `LowRankKitError` when no cut of any group raised the measured loss."""
        return self.ranks_or_channels(candidates, (), budget, probe)

    def ranks_or_channels(
        self,
        candidates: Sequence[Candidate],
        narrowings: Sequence[Narrowing],
        budget: Budget,
        probe: Probe | None = None,
    ) -> dict[str, int]:
        """See `Allocation.ranks_or_channels`; channels are measured as a role of their own."""
        assert probe is not None
        options = [*options_of(candidates, budget), *options_beside(narrowings, candidates, budget)]
        every = [*candidates, *narrowings]
        tails = [losses_at(c.tail, o) for c, o in zip(every, options, strict=True)]
        calibrated = self._calibrated(every, options, tails, probe)
        depth = max(1, *(c.block for c in candidates))
        weights = [[1 + bias * (1 - c.block / depth) for c in every] for bias in self.depth_bias]
        weighted = [[[w * x for x in xs] for w, xs in zip(ws, calibrated, strict=True)] for ws in weights]
        solver = partial(solve, budget=budget.parameters)
        plans = [choose(candidates, narrowings, budget, options, curves, solver) for curves in [*weighted, tails]]
        return min(plans, key=probe.loss_change)

    def _calibrated(
        self, candidates: Sequence[Candidate], options: Sequence[Options], tails: Curves, probe: Probe
    ) -> Curves:
        """Every tail curve in units of the measured loss."""
        blocks = 1 + max(c.block for c in candidates)
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for item, candidate in enumerate(candidates):
            groups[candidate.role, candidate.block * self.depth_ranges // blocks].append(item)
        pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for group, items in groups.items():
            pairs[group] = []
            for share in self.probes:
                at = {item: options[item].within(share * candidates[item].dense_cost) for item in items}
                predicted = sum(tails[item][index] for item, index in at.items())
                if predicted > 0:
                    cut = {candidates[item].name: options[item].ranks[index] for item, index in at.items()}
                    pairs[group].append((predicted, probe.loss_change(cut)))
        if not any(pairs.values()):
            return tails
        ratios = [measured / predicted for found in pairs.values() for predicted, measured in found if measured > 0]
        if not ratios:
            raise LowRankKitError(
                f"cutting {len(groups)} groups of matrices to {list(self.probes)} of their size never raised the "
                "measured loss, so nothing can be calibrated; measure on more text or cut deeper (allocation.probes)"
            )
        middle = median(ratios)
        bounds = middle / self.limit, middle * self.limit
        curves = [list(curve) for curve in tails]
        for group, items in groups.items():
            scale, power = _fit([(p, min(max(m, bounds[0] * p), bounds[1] * p)) for p, m in pairs[group]])
            factor = (scale or middle) * len(items) ** (power - 1)
            for item in items:
                curves[item] = [factor * x**power if x else 0.0 for x in tails[item]]
        return curves


def _fit(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float]:
    """Scale and exponent of ``measured = scale * predicted^exponent``, the exponent kept within 0.5 to 2."""
    if not pairs:
        return None, 1.0
    points = [(log(predicted), log(measured)) for predicted, measured in pairs]
    x, y = fmean(p for p, _ in points), fmean(m for _, m in points)
    spread = sum((p - x) ** 2 for p, _ in points)
    # Two probes that fall on one option say nothing about the exponent.
    power = sum((p - x) * (m - y) for p, m in points) / spread if spread > 1e-6 else 1.0
    power = min(max(power, 0.5), 2.0)
    return exp(y - power * x), power
