"""Channels weighed against the ranks of the matrices that they are made of."""

from itertools import product

import pytest
import torch

from lowrank_kit.allocations.allocation import Budget
from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.loss import Loss
from lowrank_kit.allocations.narrowing import Narrowing
from lowrank_kit.models.units import Units
from lowrank_kit.spectral.eliminate import Elimination

HIDDEN, WIDTH = 12, 20
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


def power(count, exponent, scale):
    return scale * torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def narrowing_of(matrices, losses):
    *rows, column = (candidate.members[0] for candidate in matrices)
    units = Units("channels", column.block, WIDTH, tuple(rows), (column,))
    return Narrowing.of(units, Elimination(torch.arange(WIDTH), losses))


def block(make, number, scale, channel_scale):
    """Candidates of a block, and its narrowing: losses of channels grow as they become fewer."""
    matrices = [make(r, number, s, power(HIDDEN, 0.5 + i, scale * (1 + i))) for i, (r, s) in enumerate(SHAPES.items())]
    return matrices, narrowing_of(matrices, power(WIDTH, 1.5, channel_scale).flip(0))


def answer_of(candidates, narrowings, ranks):
    """Cost and loss of an answer, counted from what is left of every matrix."""
    by_name = {candidate.name: candidate for candidate in candidates}
    cost = sum(c.cost(ranks[c.name]) for c in candidates)
    loss = sum(float(c.tail[ranks[c.name] :].sum()) for c in candidates if ranks[c.name] < c.full_rank)
    for narrowing in narrowings:
        left = ranks[narrowing.name]
        if left < WIDTH:
            assert all(ranks[ref.name] == by_name[ref.name].full_rank for ref in narrowing.members)
            cost -= (WIDTH - left) * 3 * HIDDEN
            loss += float(narrowing.elimination.losses[: WIDTH - left].sum())
    return cost, loss


def best_by_enumeration(matrices, narrowing, parameters):
    every = [[*range(1, c.break_even + 1), c.full_rank] for c in matrices]
    names = [c.name for c in matrices]
    cut = [dict(zip(names, ranks, strict=True)) | {narrowing.name: WIDTH} for ranks in product(*every)]
    dense = {c.name: c.full_rank for c in matrices}
    plans = [*cut, *(dense | {narrowing.name: left} for left in range(1, WIDTH))]
    found = [answer_of(matrices, [narrowing], plan) for plan in plans]
    return min(loss for cost, loss in found if cost <= parameters)


@pytest.mark.parametrize("channel_scale", [0.05, 1.0, 20.0], ids=["cheap", "between", "dear"])
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7, 0.9])
def test_an_mlp_becomes_narrower_exactly_where_that_costs_less(make, keep, channel_scale):
    matrices, narrowing = block(make, 0, 1.0, channel_scale)
    parameters = int(keep * sum(c.dense_cost for c in matrices))
    ranks = Lagrangian().ranks_or_channels(matrices, [narrowing], Budget(parameters))
    cost, loss = answer_of(matrices, [narrowing], ranks)
    assert cost <= parameters
    best = best_by_enumeration(matrices, narrowing, parameters)
    # Within the duality gap of one block: the last step that did not fit.
    assert best - 1e-12 <= loss <= best + float(max(c.tail.max() for c in [*matrices, narrowing]))
    if channel_scale == 0.05:
        assert ranks[narrowing.name] < WIDTH
    if channel_scale == 20.0:
        assert ranks[narrowing.name] == WIDTH


def test_one_multiplier_decides_for_all_blocks(make):
    """What the last channel kept saves a parameter is what the last rank kept of any other matrix does."""
    blocks = [block(make, number, 1.0 + number, 0.3 * 30**number) for number in range(4)]
    candidates, narrowings = [c for matrices, _ in blocks for c in matrices], [narrowing for _, narrowing in blocks]
    parameters = int(0.6 * sum(c.dense_cost for c in candidates))
    ranks = Lagrangian().ranks_or_channels(candidates, narrowings, Budget(parameters, dense=False))
    narrowed = [n for n in narrowings if ranks[n.name] < WIDTH]
    assert 0 < len(narrowed) < 4
    cost, loss = answer_of(candidates, narrowings, ranks)
    assert parameters - 3 * HIDDEN < cost <= parameters
    ranked = Lagrangian().ranks(candidates, Budget(parameters, dense=False))
    assert loss < answer_of(candidates, [], ranked)[1]
    gone = {ref.name for n in narrowed for ref in n.members}
    last, following = [], []
    for c in [*narrowed, *(c for c in candidates if c.name not in gone)]:
        k = ranks[c.name]
        last += [float(c.tail[k - 1]) / c.first_rank_cost] if k > 1 else []
        following += [float(c.tail[k]) / c.first_rank_cost] if k < c.break_even else []
    assert sorted(last)[1] >= sorted(following)[-2]


@pytest.mark.parametrize("rule", [Lagrangian(), Loss(probes=(0.6,), depth_bias=(0.0,))])
def test_multiples_and_floors_hold_for_widths(make, rule, tails_probe):
    (first, cheap), (second, dear) = block(make, 0, 1.0, 1e-3), block(make, 1, 1.0, 1.0)
    candidates, narrowings = [*first, *second], [cheap, dear]
    probe = tails_probe([*candidates, *narrowings])
    parameters = int(0.65 * sum(c.dense_cost for c in candidates))
    widths = {}
    for floor in (0.0, 0.7):
        ranks = rule.ranks_or_channels(candidates, narrowings, Budget(parameters, 4, floor), probe)
        widths[floor] = ranks[cheap.name]
        assert answer_of(candidates, narrowings, ranks)[0] <= parameters
    # 0.7 of the uniform width 13, down to a multiple of four.
    assert widths == {0.0: 4, 0.7: 8}


def test_a_measured_rule_measures_channels_as_a_role_of_their_own(make, tails_probe):
    """Channels that cost ten times what their tail says are left where they are."""
    matrices, narrowing = block(make, 0, 1.0, 2.0)
    budget = Budget(int(0.6 * sum(c.dense_cost for c in matrices)))
    found = {}
    for factor in (1.0, 9.0):
        probe = tails_probe([*matrices, narrowing], lambda c, factor=factor: factor if c is narrowing else 1.0)
        found[factor] = Loss(depth_bias=(0.0,)).ranks_or_channels(matrices, [narrowing], budget, probe)
        assert {narrowing.name} in [set(asked) for asked in probe.asked]
    assert found[1.0][narrowing.name] < found[9.0][narrowing.name] == WIDTH
