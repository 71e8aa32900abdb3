import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lowrank_kit.spectral.allocate import allocate, spend, water_fill


def ranks_of(weights, cost, budget, floor, cap, multiple=1):
    """Ranks in proportion to weights, multiples between a floor and a cap that cost so much each."""
    first = [-(-least // multiple) * multiple for least in floor]
    prices = [range(f * c, most * c + 1, multiple * c) for f, most, c in zip(first, cap, cost, strict=True)]
    units = [multiple * c for c in cost]
    chosen = allocate([w * c for w, c in zip(weights, cost, strict=True)], prices, units, budget)
    return [least + multiple * n for least, n in zip(first, chosen, strict=True)]


@st.composite
def problems(draw):
    items = draw(st.integers(1, 12))
    multiple = draw(st.sampled_from([1, 2, 8]))
    per_item = {"min_size": items, "max_size": items}
    weights = draw(st.lists(st.floats(0, 1e6), **per_item))
    cost = draw(st.lists(st.integers(1, 5000), **per_item))
    floor = draw(st.lists(st.integers(0, 20), **per_item))
    room = draw(st.lists(st.integers(0, 200), **per_item))
    cap = [f + multiple + r for f, r in zip(floor, room, strict=True)]
    least = sum(-(-f // multiple) * multiple * c for f, c in zip(floor, cost, strict=True))
    budget = least + draw(st.integers(0, 1_500_000))
    return weights, cost, budget, floor, cap, multiple


@given(problems())
def test_budget_bounds_and_multiples_are_kept_and_no_further_step_fits(problem):
    _, cost, budget, floor, cap, multiple = problem
    ranks = ranks_of(*problem)
    spent = sum(r * c for r, c in zip(ranks, cost, strict=True))
    assert spent <= budget
    for rank, c, least, most in zip(ranks, cost, floor, cap, strict=True):
        assert least <= rank <= most
        assert rank % multiple == 0
        assert rank + multiple > most or spent + multiple * c > budget
    assert ranks == ranks_of(*problem)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    st.integers(1, 1000),
    st.integers(0, 100_000),
    st.sampled_from([1, 8]),
)
def test_equal_costs_stay_within_one_step_of_proportional(weights, cost, budget, multiple):
    n = len(weights)
    ranks = ranks_of(weights, [cost] * n, budget, [0] * n, [10**6] * n, multiple)
    for rank, weight in zip(ranks, weights, strict=True):
        assert abs(rank - budget / cost * weight / sum(weights)) < multiple * (1 + 1e-6)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 5000)), min_size=1, max_size=12),
    st.integers(0, 10**6),
    st.sampled_from([1, 8]),
)
def test_unequal_costs_never_fall_a_step_below_proportional(items, budget, multiple):
    weights, cost = zip(*items, strict=True)
    n = len(items)
    ranks = ranks_of(weights, cost, budget, [0] * n, [10**8] * n, multiple)
    unit = budget / sum(w * c for w, c in items)
    for rank, weight in zip(ranks, weights, strict=True):
        assert rank > unit * weight - multiple * (1 + 1e-6)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(1, 300))
def test_equal_costs_match_hamiltons_method(votes, seats):
    assume(sum(votes) > 0)
    quotas = [divmod(seats * v, sum(votes)) for v in votes]
    order = sorted(range(len(votes)), key=lambda i: (-quotas[i][1], i))
    left = seats - sum(whole for whole, _ in quotas)
    expected = [whole + (i in order[:left]) for i, (whole, _) in enumerate(quotas)]
    n = len(votes)
    assert ranks_of(votes, [1] * n, seats, [0] * n, [10**6] * n) == expected


def test_capped_items_pass_their_share_on_in_proportion():
    assert ranks_of([8, 1, 1], [1] * 3, 100, [0] * 3, [40, 100, 100]) == [40, 30, 30]


def test_floors_are_paid_by_the_others_in_proportion():
    assert ranks_of([0, 1, 3], [1] * 3, 100, [20, 0, 0], [100] * 3) == [20, 20, 60]


def test_a_rank_of_a_wide_matrix_costs_more_of_the_budget():
    assert ranks_of([1, 1], [100, 300], 4000, [0, 0], [50, 50]) == [10, 10]


def test_more_than_enough_gives_the_caps_rounded_down():
    assert ranks_of([1, 0], [3, 5], 10**6, [0, 0], [30, 17], 8) == [24, 16]


def test_no_weight_at_all_shares_evenly():
    assert ranks_of([0, 0], [1, 1], 10, [0, 0], [9, 9]) == [5, 5]


def test_steps_of_unequal_price_are_taken_by_urgency_as_far_as_they_fit():
    prices = [[1, 2, 10], [3, 4, 5], [2, 3, 4]]
    urgency = [[9.0, 8.0], [1.0, 7.0], [5.0, 0.5]]
    # 14 - 6 = 8 to spend: item 0 once; its leap of 8 no longer fits, so item 2 once, item 1 twice, item 2 again.
    assert spend([0, 0, 0], prices, 14, lambda item, n: urgency[item][n]) == [1, 2, 2]
    assert spend([0, 0, 0], prices, 8, lambda item, n: urgency[item][n]) == [1, 0, 1]


def test_water_fill_meets_the_budget_inside_fractional_bounds():
    ideal = water_fill([1, 4, 3], 200, [5, 0, 0], [300, 70.5, 300])
    assert sum(ideal) == pytest.approx(200)
    assert ideal[1] == 70.5
    assert ideal[2] == pytest.approx(3 * ideal[0])
