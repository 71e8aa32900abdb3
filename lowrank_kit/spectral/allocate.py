"""Integer ranks for many matrices under one budget, exactly."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from math import isfinite


def allocate(
    weights: Sequence[float | int],
    cost_per_rank: Sequence[int],
    budget: int,
    floor: Sequence[int],
    cap: Sequence[int],
    multiple: int = 1,
) -> list[int]:
    """Ranks proportional to `weights` with `sum rank * cost <= budget` and no room left for one more step.

    One entry per item in every sequence; a step is `multiple` ranks, floors are rounded up to it, caps down.
    The proportional ideals inside floors and caps are rounded down; then steps go to the items furthest
    below their ideal (largest remainder, ties to the first) as long as one fits. With equal costs and no
    bound in the way each rank is within one step of its ideal; with unequal ones, cheap items take what only
    they can use. A budget beyond all caps gives the caps.

    Raises:
        ValueError: sequences of unequal length, a negative or non-finite weight, a floor above its cap, or
            floors that cost more than the budget (the message names the nearest feasible one).
    """
    _check(weights, cost_per_rank, floor, cap, multiple)
    low = [-(-rank // multiple) for rank in floor]
    high = [rank // multiple for rank in cap]
    step_cost = [cost * multiple for cost in cost_per_rank]
    for item, (least, most) in enumerate(zip(low, high, strict=True)):
        if least > most:
            raise ValueError(
                f"item {item}: floor {floor[item]} (up to {least * multiple}) exceeds cap {cap[item]} "
                f"(down to {most * multiple}) in multiples of {multiple}; lower the floor or the multiple"
            )
    needed = _total(low, step_cost)
    if needed > budget:
        raise ValueError(f"the floors alone cost {needed}, above the budget {budget}; nearest feasible: {needed}")

    ideal = water_fill(weights, step_cost, budget, low, high)
    prices = [range(0, (most + 1) * cost, cost) for most, cost in zip(high, step_cost, strict=True)]
    start = [int(x) for x in _clip(ideal, low, high)]
    steps = spend(start, prices, budget, lambda item, taken: ideal[item] - taken)
    return [n * multiple for n in steps]


def spend(
    start: Sequence[int], prices: Sequence[Sequence[int]], budget: int, urgency: Callable[[int, int], float]
) -> list[int]:
    """Step from price to dearer price, the most urgent step first, until none fits the budget.

    ``prices[i]`` are item i's total prices, ascending, ``start[i]`` the index it starts from and
    ``urgency(i, n)`` that of its step from index n to n + 1; ties go to the first item. An item whose next
    step does not fit takes no more, for money never comes back.
    """
    steps = list(start)
    left = budget - sum(price[n] for price, n in zip(prices, steps, strict=True))
    # Rounding lets urgencies that are equal on paper tie, so that round-off does not decide the order.
    queue = [(_order(urgency(item, n)), item) for item, n in enumerate(steps) if n + 1 < len(prices[item])]
    heapify(queue)
    while queue:
        _, item = heappop(queue)
        n, price = steps[item], prices[item]
        if price[n + 1] - price[n] > left:
            continue
        left -= price[n + 1] - price[n]
        steps[item] = n + 1
        if n + 2 < len(price):
            heappush(queue, (_order(urgency(item, n + 1)), item))
    return steps


def _order(urgency: float) -> float:
    return -float(f"{urgency:.9e}")


def water_fill(
    weights: Sequence[float | int],
    step_cost: Sequence[int],
    budget: int,
    low: Sequence[float | int],
    high: Sequence[float | int],
) -> list[float]:
    """Steps ``t w`` inside their bounds, for the largest common ``t`` at which they still meet the budget."""
    scale = max(weights, default=0) or 1
    share = [weight / scale for weight in weights]
    # A share below 1e-30 counts as none here: it would only push the bracket out of floating-point reach.
    below, above = 0.0, max((most / w for w, most in zip(share, high, strict=True) if w > 1e-30), default=0.0)
    for _ in range(200):
        middle = (below + above) / 2
        if _total(_clip([middle * w for w in share], low, high), step_cost) <= budget:
            below = middle
        else:
            above = middle
    return [float(x) for x in _clip([below * w for w in share], low, high)]


def _clip(ideal: Sequence[float | int], low: Sequence[float | int], high: Sequence[float | int]) -> list[float | int]:
    return [min(max(x, least), most) for x, least, most in zip(ideal, low, high, strict=True)]


def _total(steps: Sequence[float | int], step_cost: Sequence[int]) -> float | int:
    return sum(n * cost for n, cost in zip(steps, step_cost, strict=True))


def _check(
    weights: Sequence[float | int],
    cost_per_rank: Sequence[int],
    floor: Sequence[int],
    cap: Sequence[int],
    multiple: int,
) -> None:
    lengths = [len(weights), len(cost_per_rank), len(floor), len(cap)]
    if len(set(lengths)) > 1:
        raise ValueError(f"weights, cost_per_rank, floor and cap need one entry per item, got lengths {lengths}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    for item, (weight, cost, least) in enumerate(zip(weights, cost_per_rank, floor, strict=True)):
        if not isfinite(weight) or weight < 0:
            raise ValueError(f"item {item}: weight must be finite and not negative, got {weight}")
        if cost < 1:
            raise ValueError(f"item {item}: cost_per_rank must be at least 1, got {cost}")
        if least < 0:
            raise ValueError(f"item {item}: floor must not be negative, got {least}")
