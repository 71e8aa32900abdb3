"""Channels beside ranks: an MLP that becomes narrower, weighed against low-rank matrices by one multiplier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from lowrank_kit.allocations.allocation import Budget, Candidate
from lowrank_kit.allocations.budget import Options, finish, saving_per_parameter
from lowrank_kit.allocations.knapsack import lower_hull, pareto
from lowrank_kit.models.units import Units
from lowrank_kit.spectral.eliminate import Elimination

Curves = Sequence[Sequence[float]]
Solver = Callable[[Sequence[Sequence[int]], Curves], list[int]]
"""Costs and losses of the options of every item in, an option's index for each out."""


@dataclass(frozen=True)
class Narrowing(Candidate):
    """An MLP that may lose channels instead of rank; its "rank" is the number of channels left, all of them: dense.

    ``members`` are all its matrices, which are not cut where channels go. ``tail[k:].sum()`` is the cost of keeping k.
    """

    units: Units = field(kw_only=True)
    elimination: Elimination = field(kw_only=True)

    @classmethod
    def of(cls, units: Units, elimination: Elimination) -> "Narrowing":
        """The narrowing of an MLP, from the elimination of its channels."""
        tail = elimination.losses.flip(0)
        return cls(units.name, units.linears, tail, units=units, elimination=elimination)

    @property
    def role(self) -> str:
        """One of its own: a rule that measures roles measures the loss of channels apart."""
        return self.units.kind

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Channels, and the weights of one."""
        return self.units.count, self.units.cost

    @cached_property
    def full_rank(self) -> int:
        """All channels."""
        return self.units.count

    @cached_property
    def break_even(self) -> int:
        """Every channel that goes saves parameters."""
        return self.units.count - 1

    @property
    def first_rank_cost(self) -> int:
        """Weights of a channel."""
        return self.units.cost

    def cost(self, rank: int) -> int:
        """Weights of so many channels, which are stored as they are."""
        return rank * self.units.cost

    def rank_at(self, parameters: float) -> float:
        """Channels of so many weights, not rounded."""
        return parameters / self.units.cost


@dataclass(frozen=True)
class _Item:
    """What a solver chooses one of: ascending costs, and the options of candidates, by number, that each stands for."""

    costs: list[int]
    losses: list[float]
    options: list[dict[int, int]]


def choose(
    candidates: Sequence[Candidate],
    narrowings: Sequence[Narrowing],
    budget: Budget,
    options: Sequence[Options],
    losses: Curves,
    solver: Solver,
) -> dict[str, int]:
    """The ranks (of a narrowing: channels) of least total loss, as `Allocation.ranks` has them.

    ``options`` and ``losses`` are of the candidates, then of the narrowings. An MLP is cut matrix by matrix, along the
    lower convex hull of its matrices together, or narrowed: the solver sees the better of both at every cost.
    """
    every = [*candidates, *narrowings]
    number = {candidate.name: index for index, candidate in enumerate(every)}
    replaced = {number[ref.name] for narrowing in narrowings for ref in narrowing.members}
    items = [
        _Item(list(o.costs), list(v), [{index: n} for n in range(len(o.costs))])
        for index, (o, v) in enumerate(zip(options, losses, strict=True))
        if index < len(candidates) and index not in replaced
    ]
    for narrowing in narrowings:
        points = _together([number[ref.name] for ref in narrowing.members], options, losses)
        index, last = number[narrowing.name], len(options[number[narrowing.name]].costs)
        # All channels: that is every matrix dense, if these may be.
        last -= options[index].ranks[-1] == narrowing.full_rank
        points += [(options[index].costs[n], losses[index][n], {index: n}) for n in range(last)]
        items.append(_pareto(points))
    chosen: dict[int, int] = {}
    for item, option in zip(items, solver([i.costs for i in items], [i.losses for i in items]), strict=True):
        chosen |= item.options[option]
    numbers = sorted(chosen)
    free, theirs = [every[n] for n in numbers], [options[n] for n in numbers]
    urgency = saving_per_parameter(theirs, [losses[n] for n in numbers])
    ranks = finish(free, budget, theirs, [chosen[n] for n in numbers], urgency)
    return {candidate.name: candidate.full_rank for candidate in every} | ranks


def _together(
    members: Sequence[int], options: Sequence[Options], losses: Curves
) -> list[tuple[int, float, dict[int, int]]]:
    """Cost, loss and options of several matrices along the hull of all: the steepest step of any of them first."""
    steps = []
    for member in members:
        costs, lost = options[member].costs, losses[member]
        for before, after in pairwise(lower_hull(costs, lost)):
            steps.append(((lost[before] - lost[after]) / (costs[after] - costs[before]), member, after))
    at = dict.fromkeys(members, 0)
    points = []
    for step in [None, *sorted(steps, key=lambda step: -step[0])]:
        if step is not None:
            at = at | {step[1]: step[2]}
        cost = sum(options[member].costs[n] for member, n in at.items())
        points.append((cost, sum(losses[member][n] for member, n in at.items()), at))
    return points


def _pareto(points: Sequence[tuple[int, float, dict[int, int]]]) -> _Item:
    """The points that no cheaper one matches."""
    kept = [points[n] for n in pareto([cost for cost, _, _ in points], [loss for _, loss, _ in points])]
    return _Item([cost for cost, _, _ in kept], [loss for _, loss, _ in kept], [options for _, _, options in kept])
