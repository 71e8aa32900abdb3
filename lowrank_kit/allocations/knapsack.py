"""One option for every matrix, least total loss, within a budget: the multiple-choice knapsack."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Relaxed:
    """The Lagrangian answer: options by index, their loss, and what no answer can go below."""

    chosen: list[int]
    loss: float
    bound: float
    price: float
    """Loss that one more parameter would save at the bound (the multiplier mu)."""


def relax(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> Relaxed:
    """Minimise ``sum loss + mu cost`` with mu lowered until the next option no longer fits the budget.

    Every item walks along the lower convex hull of its (cost, loss) points, steepest slope of all first: exactly
    the answers for falling mu, so no bisection is needed, and points above a hull (ranks just short of dense)
    are left out. Steps that do not fit are skipped and flatter ones taken, as far as the budget goes.
    ``bound`` is the linear relaxation's value: the first step that does not fit, taken in part.

    Costs ascend within an item; the first options must fit together.
    """
    hulls = [lower_hull(c, v) for c, v in zip(costs, losses, strict=True)]
    steps = []
    for item, hull in enumerate(hulls):
        for before, after in pairwise(hull):
            price, gain = costs[item][after] - costs[item][before], losses[item][before] - losses[item][after]
            steps.append((gain / price, item, after, price, gain))
    steps.sort(key=lambda step: -step[0])
    chosen = [0] * len(hulls)
    left = budget - sum(c[0] for c in costs)
    loss = float(sum(v[0] for v in losses))
    bound, mu, stopped = None, 0.0, set[int]()
    for slope, item, after, price, gain in steps:
        if item in stopped:
            continue
        if price <= left:
            chosen[item], left, loss = after, left - price, loss - gain
            continue
        if bound is None:
            bound, mu = loss - gain * left / price, slope
        stopped.add(item)
    return Relaxed(chosen, float(loss), float(loss if bound is None else bound), float(mu))


def solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, gap: float = 1e-6
) -> list[int]:
    """The options, by index, of least total loss within the budget, to a relative ``gap``.

    An option whose Lagrangian value exceeds its item's best by more than the Lagrangian answer exceeds the bound
    is in no better answer; the few that remain go to HiGHS. Should it end without a better answer, the
    Lagrangian one stands.
    """
    # Imported where it is used: whoever only reads settings does without.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    relaxed = relax(costs, losses, budget)
    slack = relaxed.loss - relaxed.bound
    values = [np.asarray(v, float) + relaxed.price * np.asarray(c, float) for c, v in zip(costs, losses, strict=True)]
    # Round-off in the bound must not fix an option that belongs to the optimum.
    slack += 1e-12 * max(float(np.abs(v).max()) for v in values) * len(values)
    kept = [np.flatnonzero(v <= v.min() + slack) for v in values]
    owner = np.repeat(np.arange(len(kept)), [len(options) for options in kept])
    loss = np.concatenate([np.asarray(v, float)[k] for v, k in zip(losses, kept, strict=True)])
    cost = np.concatenate([np.asarray(c, float)[k] for c, k in zip(costs, kept, strict=True)])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(kept), len(owner)))
    scale = float(np.abs(loss).max()) or 1.0
    unit = float(np.gcd.reduce(cost.astype(np.int64)))
    found = milp(
        loss / scale,
        integrality=np.ones_like(loss),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(cost[None] / unit), -np.inf, np.floor(budget / unit)),
        ],
        options={"mip_rel_gap": gap, "time_limit": 10},
    )
    if found.x is None:
        return relaxed.chosen
    picked = np.flatnonzero(found.x > 0.5)
    options = np.concatenate(kept)[picked]
    fits = len(picked) == len(kept) and cost[picked].sum() <= budget
    return options.tolist() if fits and loss[picked].sum() < relaxed.loss else relaxed.chosen


def pareto(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the points that none as cheap matches, the cheapest first."""
    kept: list[int] = []
    for point in sorted(range(len(costs)), key=lambda n: (costs[n], losses[n])):
        if not kept or losses[point] < losses[kept[-1]]:
            kept.append(point)
    return kept


def lower_hull(cost: Sequence[int], loss: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull from the first point to the least loss."""
    hull: list[int] = []
    for point in range(min(range(len(loss)), key=loss.__getitem__) + 1):
        while len(hull) > 1:
            first, middle = hull[-2], hull[-1]
            rise = (loss[middle] - loss[first]) * (cost[point] - cost[first])
            if rise < (loss[point] - loss[first]) * (cost[middle] - cost[first]):
                break
            hull.pop()
        hull.append(point)
    return hull
