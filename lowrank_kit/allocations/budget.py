"""The one way in which every rule meets its budget: legal options, proportional shares, the last steps."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import fmean, pstdev

from jaxtyping import Float64

from lowrank_kit.allocations.allocation import Budget, Candidate
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError
from lowrank_kit.spectral.allocate import allocate, spend


@dataclass(frozen=True)
class Options:
    """The ranks that a candidate may get and what each costs, both ascending; the last may mean dense.

    One step to the next option costs at most what `multiple` first ranks do, also the step from the cap to dense, but
    for a joint basis, whose ranks end below a member's full rank.
    """

    ranks: tuple[int, ...]
    costs: tuple[int, ...]

    def within(self, cost: float | int) -> int:
        """Index of the dearest option that costs at most this; the cheapest where none does."""
        return max(bisect_right(self.costs, cost) - 1, 0)

    def dearer_than(self, index: int) -> "Options":
        """The options from this one on."""
        return Options(self.ranks[index:], self.costs[index:])


def options_of(candidates: Sequence[Candidate], budget: Budget) -> list[Options]:
    """What each candidate may get, from its floor to its cap at break-even, then dense if that is allowed.

    Raises:
        ConfigError: a multiple above a cap, one step for each above the budget, floors above the budget, or
            (without dense) a budget above all caps. The message gives the nearest feasible value.
    """
    keep = keep_of(candidates, budget)
    every = [_legal(candidate, budget) for candidate in candidates]
    least, most = _cheapest(every), sum(options.costs[-1] for options in every)
    if least > budget.parameters:
        raise ConfigError(
            f"a budget of {budget.parameters} {budget.unit} for {len(every)} matrices is too small: "
            f"{_why_too_small(budget)}; nearest feasible: {_amount(least, candidates, budget)}"
        )
    if most < budget.parameters and not budget.dense:
        raise ConfigError(
            f"a budget of {budget.parameters} {budget.unit} for {len(every)} matrices is too large: with the rank "
            f"multiple {budget.multiple} the ranks that save {budget.unit} end at {most} in total, and no matrix may "
            f"be left dense; allow dense, or nearest feasible: {_amount(most, candidates, budget)}"
        )
    floored = _with_floors(candidates, every, budget, keep)
    if _cheapest(floored) > budget.parameters:
        highest = max(budget.floor_of(candidate) for candidate in candidates)
        scales = (percent / 100 for percent in range(100, -1, -1))
        nearest = next(
            s for s in scales if _cheapest(_with_floors(candidates, every, budget, keep * s)) <= budget.parameters
        )
        raise ConfigError(
            f"a floor of {highest:g} of the uniform rank costs {_cheapest(floored)} {budget.unit}, above the "
            f"budget of {budget.parameters}, because some matrices cannot go below one rank multiple "
            f"({budget.multiple}); nearest feasible floor: {highest * nearest:g}"
        )
    return floored


def options_beside(others: Sequence[Candidate], candidates: Sequence[Candidate], budget: Budget) -> list[Options]:
    """What others may get that stand for some of the candidates: from the same floor, a share of what these keep."""
    return _with_floors(others, [_legal(other, budget) for other in others], budget, keep_of(candidates, budget))


def largest(candidates: Sequence[Candidate], budget: Budget) -> int:
    """Parameters of all candidates at their last option: the most that a budget can be spent on."""
    return sum(_legal(candidate, budget).costs[-1] for candidate in candidates)


def proportional(candidates: Sequence[Candidate], budget: Budget, weights: Sequence[float | int]) -> dict[str, int]:
    """Parameters proportional to non-negative weights, inside floors and caps, by largest remainder; as ranks.

    Raises:
        ConfigError: see `options_of`.
    """
    options = options_of(candidates, budget)
    units = [budget.multiple * candidate.first_rank_cost for candidate in candidates]
    chosen = allocate(weights, [o.costs for o in options], units, budget.parameters)
    return {c.name: o.ranks[index] for c, o, index in zip(candidates, options, chosen, strict=True)}


def keep_of(candidates: Sequence[Candidate], budget: Budget) -> float:
    """The share of their parameters that the candidates may keep; at the uniform rank, each keeps this share.

    Raises:
        ConfigError: there is no candidate.
    """
    if not candidates:
        raise ConfigError("no matrix is left to compress; exclude fewer roles")
    return budget.parameters / sum(candidate.dense_cost for candidate in candidates)


def floor_at_break_even(candidates: Sequence[Candidate], budget: Budget, share: float) -> Budget:
    """The budget with a floor, if it has no higher one, at this share of break-even."""
    # That costs this share of the dense matrix, the uniform rank `keep` of it.
    return replace(budget, floor=max(budget.floor, min(share / max(keep_of(candidates, budget), 1e-9), 1.0)))


def share_out(weights: Sequence[float], groups: Sequence[Hashable], totals: Sequence[float | int]) -> list[float]:
    """Scale weights so that they sum in each group to what its members' ``totals`` do.

    A group without any weight shares evenly.
    """
    target: dict[Hashable, float] = defaultdict(float)
    spent: dict[Hashable, float] = defaultdict(float)
    for weight, group, total in zip(weights, groups, totals, strict=True):
        target[group] += total
        spent[group] += weight
    members = Counter(groups)
    return [
        weight * target[group] / spent[group] if spent[group] else target[group] / members[group]
        for weight, group in zip(weights, groups, strict=True)
    ]


def depth_clusters(candidates: Sequence[Candidate], ranges: int) -> list[tuple[str, int]]:
    """Role and range of depth of each, the blocks being divided into this many ranges of neighbours."""
    depth = 1 + max(c.block for c in candidates)
    return [(c.role, c.block * ranges // depth) for c in candidates]


def modulated(
    candidates: Sequence[Candidate],
    budget: Budget,
    anchored: dict[str, int],
    taus: Sequence[float],
    strength: float,
    ranges: int,
) -> dict[str, int]:
    """Parameters of the rank k0 times ``exp(-strength z(tau))``; z standardises tau in a cluster, which keeps its sum.

    ``anchored`` holds k0 by name. The clusters are `depth_clusters` of this many ``ranges``.
    """
    clusters = depth_clusters(candidates, ranges)
    costs = [c.cost(anchored[c.name]) for c in candidates]
    factors = [exp(-strength * z) for z in standardised(taus, clusters)]
    weights = [cost * factor for cost, factor in zip(costs, factors, strict=True)]
    return proportional(candidates, budget, share_out(weights, clusters, costs))


def standardised(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Values minus their group's mean over its standard deviation; 0 in a group without spread."""
    inside: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        inside[group].append(value)
    moments = {group: (fmean(found), pstdev(found)) for group, found in inside.items()}
    return [
        (value - moments[group][0]) / moments[group][1] if moments[group][1] > 0 else 0.0
        for value, group in zip(values, groups, strict=True)
    ]


def finish(
    candidates: Sequence[Candidate],
    budget: Budget,
    options: Sequence[Options],
    start: Sequence[int],
    urgency: Callable[[int, int], float],
) -> dict[str, int]:
    """Spend what is left above `start` (an option's index for each), the most urgent next step first.

    ``urgency(item, index)`` is that of the step from this option to the next. Ends when no step fits.
    """
    chosen = spend(start, [o.costs for o in options], budget.parameters, urgency)
    return {c.name: o.ranks[index] for c, o, index in zip(candidates, options, chosen, strict=True)}


def losses_at(changes: Float64[Tensor, " p"], options: Options) -> list[float]:
    """``changes[k:].sum()`` at every option: what dropping the components beyond it costs."""
    # From the small end, so that a short tail is not lost in the round-off of a large total.
    sums: list[float] = [*changes.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    return [sums[min(rank, len(changes))] for rank in options.ranks]


def saving_per_parameter(options: Sequence[Options], losses: Sequence[Sequence[float]]) -> Callable[[int, int], float]:
    """Urgency for `finish`: the loss that a step saves per parameter that it costs."""

    def urgency(item: int, index: int) -> float:
        saved = losses[item][index] - losses[item][index + 1]
        return saved / (options[item].costs[index + 1] - options[item].costs[index])

    return urgency


def _legal(candidate: Candidate, budget: Budget) -> Options:
    ranks = list(range(budget.multiple, candidate.break_even + 1, budget.multiple))
    costs = [candidate.cost(rank) for rank in ranks]
    if budget.dense:
        ranks.append(candidate.full_rank)
        costs.append(candidate.dense_cost)
    if not ranks:
        rows, columns = candidate.shape
        raise ConfigError(
            f"the rank multiple {budget.multiple} does not fit {candidate.name} (role {candidate.role}), a {rows}x"
            f"{columns} matrix: ranks above {candidate.break_even} save no parameters; lower the multiple to at most "
            f"that, allow dense matrices, or exclude the role"
        )
    return Options(tuple(ranks), tuple(costs))


def _with_floors(
    candidates: Sequence[Candidate], every: Sequence[Options], budget: Budget, keep: float
) -> list[Options]:
    return [
        o.dearer_than(o.within(keep * budget.floor_of(c) * c.dense_cost))
        for c, o in zip(candidates, every, strict=True)
    ]


def _cheapest(options: Sequence[Options]) -> int:
    return sum(o.costs[0] for o in options)


def _why_too_small(budget: Budget) -> str:
    if budget.parameters <= 0 and budget.elsewhere:
        return f"the excluded matrices, left dense, already cost {budget.elsewhere}; exclude fewer roles"
    return f"each needs at least one rank multiple ({budget.multiple})"


def _amount(parameters: int, candidates: Sequence[Candidate], budget: Budget) -> str:
    total = budget.elsewhere + sum(candidate.dense_cost for candidate in candidates)
    return f"{parameters} {budget.unit}, ratio {1 - (budget.elsewhere + parameters) / total:.4f}"
