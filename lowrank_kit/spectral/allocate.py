"""Integer shares of one budget, exactly: the one way in which ranks are made of weights."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush


def allocate(
    weights: Sequence[float | int], prices: Sequence[Sequence[int]], units: Sequence[int], budget: int
) -> list[int]:
    """The price that each item pays, as an index, in proportion to `weights`; no step is left that fits the budget.

    One entry per item in every sequence. ``prices[i]`` are item i's total prices, ascending; the first ones are within
    the budget. What each should pay (`water_fill`) is rounded down to a price; then steps go to the items furthest
    below it in their ``units`` (largest remainder, ties to the first) as long as one fits. With equal units and no
    bound in the way each pays within one step of its share; with unequal ones, cheap items take what only they can
    use. A budget beyond all last prices gives these.
    """
    share = water_fill(weights, budget, [price[0] for price in prices], [price[-1] for price in prices])
    start = [max(bisect_right(price, paid) - 1, 0) for price, paid in zip(prices, share, strict=True)]
    return spend(start, prices, budget, lambda item, n: (share[item] - prices[item][n]) / units[item])


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


def water_fill(
    weights: Sequence[float | int], budget: int, low: Sequence[float | int], high: Sequence[float | int]
) -> list[float]:
    """Shares ``t w`` inside their bounds, for the largest common ``t`` at which they still meet the budget."""
    scale = max(weights, default=0) or 1
    share = [weight / scale for weight in weights]
    # A share below 1e-30 counts as none here: it would only push the bracket out of floating-point reach.
    below, above = 0.0, max((most / w for w, most in zip(share, high, strict=True) if w > 1e-30), default=0.0)
    for _ in range(200):
        middle = (below + above) / 2
        if sum(_clip([middle * w for w in share], low, high)) <= budget:
            below = middle
        else:
            above = middle
    return [float(x) for x in _clip([below * w for w in share], low, high)]


def _order(urgency: float) -> float:
    return -float(f"{urgency:.9e}")


def _clip(ideal: Sequence[float | int], low: Sequence[float | int], high: Sequence[float | int]) -> list[float | int]:
    return [min(max(x, least), most) for x, least, most in zip(ideal, low, high, strict=True)]
