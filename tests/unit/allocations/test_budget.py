import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_kit.allocations.allocation import Allocation, Budget
from lowrank_kit.allocations.asvd import Strs
from lowrank_kit.allocations.budget import options_of
from lowrank_kit.allocations.d_rank import DRank
from lowrank_kit.allocations.hisvd import HiSvd
from lowrank_kit.allocations.loss import Loss
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.allocations.zs_svd import ZeroSum
from lowrank_kit.errors import ConfigError
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.storage import Storage

RULES = [
    *(rule() for rule in Allocation.known.values()),
    HiSvd(capacity="rank", power=1.0, redundancy="slope", strength=0.3),
    HiSvd(redundancy="participation", strength=1.0),
    DRank(scope="global", guard=False),
    ZeroSum(floor=0.1),
    Strs(grid=(0.1, 0.5)),
]


def total(candidates):
    return sum(c.dense_cost for c in candidates)


def spent(candidates, ranks):
    return sum(c.cost(ranks[c.name]) for c in candidates)


def next_cost(candidate, rank, budget):
    """Cost of the next legal rank, or None at the top."""
    if rank == candidate.full_rank:
        return None
    if rank + budget.multiple <= candidate.break_even:
        return candidate.cost(rank + budget.multiple)
    return candidate.dense_cost if budget.dense else None


def cheapest(candidate, budget):
    return candidate.cost(budget.multiple if budget.multiple <= candidate.break_even else candidate.full_rank)


def assert_met(candidates, budget, ranks):
    assert list(ranks) == [c.name for c in candidates]
    left = budget.parameters - spent(candidates, ranks)
    assert left >= 0
    for c in candidates:
        rank = ranks[c.name]
        if rank == c.full_rank:
            assert budget.dense
        else:
            assert rank % budget.multiple == 0
            assert budget.multiple <= rank <= c.break_even
        following = next_cost(c, rank, budget)
        assert following is None or following - c.cost(rank) > left
        if following is not None:
            uniform = budget.parameters / total(candidates) * c.dense_cost
            assert following > budget.floor * uniform * (1 - 1e-9)


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 10**6))
    shapes = {"q": (24, 24), "k": (8, 24), "v": (8, 24), "o": (24, 24), "gate": (40, 24), "down": (24, 40)}
    roles = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=6, unique=True))
    blocks = draw(st.integers(1, 4))
    members = draw(st.sampled_from([1, 1, 2, 3]))
    zeros = draw(st.booleans())
    floor = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    dense = draw(st.sampled_from([True, True, False]))
    keep = draw(st.floats(0.05, 1.0))
    storage = Storage.known[draw(st.sampled_from(sorted(Storage.known)))]()
    return (
        seed,
        {r: shapes[r] for r in roles},
        blocks,
        members,
        zeros,
        Budget(0, draw(st.sampled_from([1, 2, 4])), floor, dense),
        keep,
        storage,
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_every_rule_meets_the_budget_or_says_why_not(make, all_spectra, tails_probe, rule, problem):
    seed, shapes, blocks, members, zeros, budget, keep, storage = problem
    generator = torch.Generator().manual_seed(seed)
    candidates = []
    for block in range(blocks):
        for role, (out, width) in shapes.items():
            scale, power = torch.rand(2, generator=generator).tolist()
            tail = scale * torch.arange(1, min(members * out, width) + 1, dtype=torch.float64) ** -(3 * power)
            if zeros:
                tail[len(tail) // 3 :] = 0
            spectra = all_spectra(tail, generator)
            candidate = make(role, block * members, (out, width), tail, members, **spectra)
            candidates.append(replace(candidate, price=storage))
    budget = replace(budget, parameters=int(keep * total(candidates)))
    try:
        ranks = rule.ranks(candidates, budget, tails_probe(candidates))
    except ConfigError as error:
        caps = sum(c.cost(c.break_even // budget.multiple * budget.multiple) for c in candidates)
        reasons = [
            sum(cheapest(c, budget) for c in candidates) > budget.parameters,
            not budget.dense and caps < budget.parameters,
            "nearest feasible floor" in str(error) and (budget.floor > 0 or isinstance(rule, ZeroSum)),
            isinstance(rule, Strs) and "allocation.grid" in str(error),
        ]
        if any(reasons):
            return
        raise
    assert_met(candidates, budget, ranks)
    assert ranks == rule.ranks(candidates, budget, tails_probe(candidates))


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_whole_model_meets_its_ratio(smollm2, tails_probe, rule, keep):
    budget = Budget(int(keep * total(smollm2)), multiple=8)
    assert_met(smollm2, budget, rule.ranks(smollm2, budget, tails_probe(smollm2)))


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_uniform_keeps_the_same_fraction_of_every_matrix(smollm2, keep):
    budget = Budget(int(keep * total(smollm2)), dense=False)
    ranks = Uniform().ranks(smollm2, budget)
    by_shape = {}
    for c in smollm2:
        out, width = c.shape
        assert ranks[c.name] >= int(keep * out * width / (out + width))
        by_shape.setdefault(c.shape, set()).add(ranks[c.name])
    assert all(max(found) - min(found) <= 1 for found in by_shape.values())


@pytest.mark.parametrize("keep", [0.97, 0.8, 0.4])
def test_uniform_keeps_the_same_fraction_of_every_matrix_whatever_a_rank_costs(smollm2, keep):
    pivots = [replace(candidate, price=Pivot()) for candidate in smollm2]
    ranks = Uniform().ranks(pivots, Budget(int(keep * total(smollm2)), dense=False))
    by_shape = {}
    for c in pivots:
        (out, width), rank = c.shape, ranks[c.name]
        # One rank more is above the share; two fewer are below, for the cheap ones take what only they can use.
        assert (rank - 2) * (out + width - rank + 2) < keep * out * width < (rank + 1) * (out + width - rank - 1)
        by_shape.setdefault(c.shape, set()).add(rank)
    assert all(max(found) - min(found) <= 1 for found in by_shape.values())


@pytest.mark.parametrize("multiple", [1, 8])
def test_pivots_leave_no_gap_below_dense(smollm2, multiple):
    """The options of a matrix go up to full rank by steps of about one price; two factors end at break-even."""
    pivots = [replace(candidate, price=Pivot()) for candidate in smollm2]
    for plain, candidate in zip(smollm2, pivots, strict=True):
        assert candidate.break_even == candidate.full_rank - 1 > plain.break_even
    for candidate, options in zip(pivots, options_of(pivots, Budget(total(smollm2), multiple)), strict=True):
        out, width = candidate.shape
        assert list(options.ranks) == list(range(multiple, min(out, width) + 1, multiple))
        assert list(options.costs) == [rank * (out + width - rank) for rank in options.ranks]


def test_the_same_bytes_buy_the_published_ranks(make):
    """Of a 4096 x 4096 matrix: 2264 for 1638 at a ratio of 0.2, 1505 for 1228 at 0.4, 923 for 819 at 0.6."""
    plain = make("o", 0, (4096, 4096), torch.ones(4096))
    pivot = replace(plain, price=Pivot())
    for keep, ranks in {0.8: (1638, 2264), 0.6: (1228, 1505), 0.4: (819, 923)}.items():
        assert (int(plain.rank_at(keep * 4096**2)), int(pivot.rank_at(keep * 4096**2))) == ranks


def test_a_joint_basis_shares_one_down(make):
    joint = make("o", 0, (576, 576), torch.ones(576), members=4)
    assert joint.first_rank_cost == 576 + 4 * 576
    assert joint.dense_cost == 4 * 576 * 576
    assert joint.full_rank == 576
    assert joint.break_even == 460  # 461 would cost more than the four matrices


def test_a_joint_basis_ends_below_a_members_full_rank(make):
    joint = make("k", 0, (192, 576), torch.ones(576), members=4)
    assert joint.break_even == 191


def test_zero_spectra_still_get_one_multiple(make):
    candidates = [make("q", b, (64, 64), torch.zeros(64) if b else torch.ones(64)) for b in range(2)]
    ranks = Loss(depth_bias=(0.0,)).ranks(candidates, Budget(64 * 64 + 8 * 128, 8), _Counting(candidates))
    assert ranks == {candidates[0].name: 64, candidates[1].name: 8}


class _Counting:
    def __init__(self, candidates):
        self.first = candidates[0]

    def divergence(self, ranks):
        return self.loss_change(ranks)

    def loss_change(self, ranks):
        rank = ranks.get(self.first.name, 64)
        return 0.0 if rank == 64 else float(64 - rank)


def feasible_from(message):
    return int(re.search(r"nearest feasible: (\d+) parameters", message).group(1))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(50_000, 64), r"too small: each needs at least one rank multiple \(64\); nearest feasible: \d+ param"),
        (Budget(-5, 8, elsewhere=90_000), "excluded matrices, left dense, already cost 90000; exclude fewer roles"),
        (Budget(220_000, 8, dense=False), "too large: with the rank multiple 8 .* allow dense, or nearest feasible"),
    ],
)
def test_impossible_budgets_name_the_constraint_and_the_nearest_feasible(make, budget, message):
    candidates = [make("q", b, (192, 576), torch.ones(192)) for b in range(2)]
    with pytest.raises(ConfigError, match=message) as caught:
        Uniform().ranks(candidates, budget)
    nearest = replace(budget, parameters=feasible_from(str(caught.value)))
    assert_met(candidates, nearest, Uniform().ranks(candidates, nearest))
    ratio = float(re.search(r"ratio (\S+)$", str(caught.value)).group(1))
    everything = total(candidates) + budget.elsewhere
    assert ratio == pytest.approx(1 - (budget.elsewhere + nearest.parameters) / everything, abs=1e-4)


def test_a_floor_that_costs_too_much_names_the_highest_feasible_one(make):
    # Small matrices must take a whole multiple, far above their uniform rank, so the large one cannot have its own.
    candidates = [make("o", 0, (256, 256), torch.ones(256))]
    candidates += [make("k", b, (16, 256), torch.ones(16)) for b in range(4)]
    budget = Budget(28_000, 8, floor=1.0)
    with pytest.raises(ConfigError, match=r"a floor of 1 .* nearest feasible floor: 0\.\d+") as caught:
        Uniform().ranks(candidates, budget)
    nearest = float(str(caught.value).rsplit(": ", 1)[1])
    assert_met(candidates, replace(budget, floor=nearest), Uniform().ranks(candidates, replace(budget, floor=nearest)))
    with pytest.raises(ConfigError, match="floor"):
        Uniform().ranks(candidates, replace(budget, floor=nearest + 0.02))


def test_a_multiple_above_break_even_names_the_matrix(make):
    candidates = [make("k", 0, (8, 24), torch.ones(8))]
    with pytest.raises(ConfigError, match=r"multiple 8 does not fit layers\.0\.k .* 8x24 .* above 5 save no"):
        Uniform().ranks(candidates, Budget(100, 8, dense=False))
    assert Uniform().ranks(candidates, Budget(192, 8)) == {"layers.0.k": 8}


def test_without_candidates_there_is_nothing_to_do():
    with pytest.raises(ConfigError, match="no matrix is left to compress"):
        Uniform().ranks([], Budget(100))
