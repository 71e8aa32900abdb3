from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.allocations.knapsack import relax, solve


@st.composite
def instances(draw, items=4, options=5):
    n = draw(st.integers(1, items))
    costs, losses = [], []
    for _ in range(n):
        count = draw(st.integers(1, options))
        costs.append(np.cumsum(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))).tolist())
        drops = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
        losses.append((sum(drops) - np.cumsum(drops)).tolist())
    least = sum(c[0] for c in costs)
    return costs, losses, least + draw(st.integers(0, 300))


def brute(costs, losses, budget):
    choices = product(*(range(len(c)) for c in costs))
    fitting = [ch for ch in choices if total(costs, ch) <= budget]
    return min(total(losses, ch) for ch in fitting)


def total(table, chosen):
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


@settings(max_examples=200, deadline=None)
@given(instances())
def test_the_exact_answer_is_that_of_enumeration(instance):
    costs, losses, budget = instance
    chosen = solve(costs, losses, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(brute(*instance), rel=1e-5, abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(instances())
def test_the_relaxation_brackets_the_optimum_within_one_step(instance):
    costs, losses, budget = instance
    relaxed = relax(costs, losses, budget)
    best = brute(*instance)
    assert total(costs, relaxed.chosen) <= budget
    assert relaxed.loss == pytest.approx(total(losses, relaxed.chosen), abs=1e-9)
    assert relaxed.bound <= best + 1e-9
    assert best <= relaxed.loss + 1e-9
    largest_step = max(row[0] - row[-1] for row in losses)
    assert relaxed.loss - relaxed.bound <= largest_step + 1e-9


@given(instances())
def test_the_bound_is_the_dual_at_its_own_multiplier(instance):
    costs, losses, budget = instance
    relaxed = relax(costs, losses, budget)
    mu = relaxed.price
    dual = sum(min(v + mu * c for c, v in zip(cs, vs, strict=True)) for cs, vs in zip(costs, losses, strict=True))
    assert relaxed.bound == pytest.approx(dual - mu * budget, abs=1e-6)


def dynamic_programme(costs, losses, budget):
    best = np.full(budget + 1, np.inf)
    best[0] = 0
    for cs, vs in zip(costs, losses, strict=True):
        following = np.full(budget + 1, np.inf)
        for cost, loss in zip(cs, vs, strict=True):
            if cost <= budget:
                following[cost:] = np.minimum(following[cost:], best[: budget + 1 - cost] + loss)
        best = following
    return best.min()


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_medium_instances_with_a_dense_option_match_dynamic_programming(keep, seed):
    generator = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(60):
        full = int(generator.integers(10, 60))
        per_rank = int(generator.integers(1, 6))
        tail = generator.uniform(0.1, 10) * np.arange(1, full + 1) ** -generator.uniform(0.2, 3)
        ranks = np.arange(1, full // 2 + 1)
        costs.append([*(ranks * per_rank).tolist(), (full // 2 + 1) * per_rank])
        losses.append([*(tail.sum() - tail.cumsum()[ranks - 1]).tolist(), 0.0])
    budget = int(keep * sum(c[-1] for c in costs))
    chosen = solve(costs, losses, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(dynamic_programme(costs, losses, budget), rel=2e-6)


def test_a_leap_to_dense_passes_over_the_ranks_above_the_hull():
    # Ranks 2 and 3 save little for their price, dense saves all: with enough budget, never stop in between.
    costs, losses = [[1, 2, 3, 4]], [[10.0, 9.5, 9.0, 0.0]]
    assert relax(costs, losses, 4).chosen == [3]
    assert relax(costs, losses, 3).chosen == [0]
    assert solve(costs, losses, 3) == [2]


def test_losses_of_any_unit_give_the_same_answer():
    costs = [[1, 2, 4, 7]] * 5
    losses = [[8.0 * (i + 1), 5.0 * (i + 1), 2.0 * (i + 1), 0.0] for i in range(5)]
    answers = {tuple(solve(costs, [[unit * x for x in row] for row in losses], 17)) for unit in (1e-12, 1, 1e12)}
    assert len(answers) == 1
