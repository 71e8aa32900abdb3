"""Zero-Sum SVD: drop components anywhere while their predicted loss changes cancel (arXiv 2602.02848)."""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import ClassVar, Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import (
    finish,
    floor_at_break_even,
    keep_of,
    losses_at,
    options_of,
    saving_per_parameter,
)
from lowrank_kit.truncations.spectra import Change, Spectrum


class ZeroSum(Allocation):
    """A greedy walk over single components with first-order loss changes ``-sigma_i u_i^T G v_i``.

    Each matrix offers its last component still kept. While the running sum of changes is at or below zero the
    walk prefers components that raise the loss, else ones that lower it; among those it takes the smallest change.
    Dropping saves nothing until a matrix reaches break-even: those that the walk leaves above it stay dense. It
    ends when the budget is met; what rounding to multiples frees goes back to where the loss is predicted to
    fall most. Checked against the authors' code, including the floor; theirs has no rank multiple.
    """

    crosses_roles: ClassVar[bool] = True

    kind: Literal["zs_svd"] = "zs_svd"
    """Marks the rule."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """No rank below this share of break-even. null: as the authors' scripts, 0 below a ratio of 0.6 and 0.3 from there
    on (they have 0.2, 0.4 and 0.6); the ratio is that of the matrices that the rule decides."""

    def needs(self) -> frozenset[Spectrum]:
        """The first-order change of every component."""
        return frozenset({Change()})

    def check(self, candidates: Sequence[Candidate], budget: Budget) -> None:
        """Raise `ConfigError` where the floor costs more than the budget."""
        options_of(candidates, self._floored(candidates, budget))

    def _floored(self, candidates: Sequence[Candidate], budget: Budget) -> Budget:
        """The budget with this rule's floor, as a share of the uniform rank."""
        keep = keep_of(candidates, budget)
        # Hundredths, so that a budget rounded to whole parameters still counts as its ratio.
        floor = (0.3 if round(1 - keep, 2) >= 0.6 else 0.0) if self.floor is None else self.floor
        return floor_at_break_even(candidates, budget, floor)

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        options = options_of(candidates, self._floored(candidates, budget))
        changes = [c.spectra["change"].tolist() for c in candidates]
        lowest = [o.ranks[0] for o in options]
        walked = self._walk(candidates, budget, changes, lowest)
        start = [o.within(c.cost(rank)) for c, o, rank in zip(candidates, options, walked, strict=True)]
        losses = [losses_at(c.spectra["change"], o) for c, o in zip(candidates, options, strict=True)]
        return finish(candidates, budget, options, start, saving_per_parameter(options, losses))

    def _walk(
        self, candidates: Sequence[Candidate], budget: Budget, changes: Sequence[Sequence[float]], lowest: Sequence[int]
    ) -> list[int]:
        """Ranks after the walk: `full_rank` for matrices that stay above break-even."""
        even = [c.break_even for c in candidates]
        kept = [c.full_rank for c in candidates] if budget.dense else list(even)
        total = sum(sum(change[rank:], 0.0) for change, rank in zip(changes, kept, strict=True))

        def cost(item: int) -> int:
            return candidates[item].cost(kept[item]) if kept[item] <= even[item] else candidates[item].dense_cost

        spent = sum(cost(item) for item in range(len(kept)))
        # By sign of the change: first those that lower the loss, then those that raise it.
        queues: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])

        def offer(item: int) -> None:
            if kept[item] > lowest[item]:
                change = changes[item][kept[item] - 1] if kept[item] <= len(changes[item]) else 0.0
                heappush(queues[change >= 0], (abs(change), item))

        for item in range(len(kept)):
            offer(item)
        while spent > budget.parameters and any(queues):
            raises = total <= 0
            if not queues[raises]:
                raises = not raises
            size, item = heappop(queues[raises])
            total += size if raises else -size
            spent -= cost(item)
            kept[item] -= 1
            spent += cost(item)
            offer(item)
        return [c.full_rank if rank > most else rank for c, rank, most in zip(candidates, kept, even, strict=True)]
