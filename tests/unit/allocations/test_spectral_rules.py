"""Rules that read spectra alone: svd_llm_v2, d_rank, swift, hisvd, energy_svd."""

from math import e

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import minimize

from lowrank_kit.allocations.allocation import Budget
from lowrank_kit.allocations.d_rank import DRank
from lowrank_kit.allocations.energy_svd import EnergySvd
from lowrank_kit.allocations.hisvd import HiSvd
from lowrank_kit.allocations.svd_llm_v2 import SvdLlmV2
from lowrank_kit.allocations.swift import Swift
from lowrank_kit.allocations.uniform import Uniform


def power(count, exponent, scale=1.0):
    return scale * torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def total(candidates):
    return sum(c.dense_cost for c in candidates)


def parameters(candidates, ranks):
    return {c.name: c.cost(ranks[c.name]) for c in candidates}


def test_svd_llm_v2_removes_twice_as_much_where_the_logarithm_of_the_loss_is_half(make):
    # Uniform at 0.7: rank 105 of 150. Losses beyond it whose log(1 + L) is 1 and 2: v = 1 and 1/2, so that of the mean
    # 0.3 the first loses 0.4 and the second 0.2: 150 x 0.6 and 150 x 0.8.
    tails = [torch.cat([torch.full((105,), 1e3), torch.full((195,), loss**2 / 195)]) for loss in (e - 1, e**2 - 1)]
    candidates = [make("q", b, (300, 300), tail) for b, tail in enumerate(tails)]
    ranks = SvdLlmV2(tokens=1).ranks(candidates, Budget(126_000, dense=False))
    assert ranks == {"layers.0.q": 90, "layers.1.q": 120}


def test_svd_llm_v2_keeps_the_budget_of_every_role(smollm2):
    keep = 0.5
    spent = parameters(smollm2, SvdLlmV2().ranks(smollm2, Budget(int(keep * total(smollm2)))))
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        members = [c for c in smollm2 if c.role == role]
        # Not exactly: a ratio above one is cut off at removing everything, and the other roles pay for it.
        assert sum(spent[c.name] for c in members) / total(members) == pytest.approx(keep, rel=0.03)


def test_svd_llm_v2_survives_matrices_without_any_loss(make):
    candidates = [make("q", b, (64, 64), power(64, 1) if b else torch.zeros(64)) for b in range(3)]
    ranks = SvdLlmV2().ranks(candidates, Budget(int(0.6 * total(candidates))))
    assert ranks["layers.0.q"] < ranks["layers.1.q"] == ranks["layers.2.q"]


def flat_then_zero(count, rank):
    """A spectrum of effective rank exactly `rank`."""
    return torch.cat([torch.ones(rank), torch.zeros(count - rank)]).double()


def test_d_rank_minimises_effective_rank_over_rank(make):
    # Independent: minimise sum R_i / k_i under the parameter budget numerically.
    shapes, effective = {"q": (300, 300), "k": (100, 300), "gate": (500, 300)}, {"q": 40, "k": 90, "gate": 200}
    tails = {role: flat_then_zero(min(shape), effective[role]) for role, shape in shapes.items()}
    candidates = [make(role, 0, shape, tails[role], whitened=tails[role]) for role, shape in shapes.items()]
    cost = np.array([c.first_rank_cost for c in candidates])
    r = np.array([effective[c.role] for c in candidates])
    budget = 60_000
    best = minimize(
        lambda k: (r / k).sum(),
        x0=np.full(3, 20.0),
        bounds=[(1, None)] * 3,
        constraints={"type": "eq", "fun": lambda k: (cost * k).sum() / budget - 1},
        options={"ftol": 1e-12},
    ).x
    ranks = DRank(scope="global", moved=0, guard=False).ranks(candidates, Budget(budget))
    np.testing.assert_allclose([ranks[c.name] for c in candidates], best, atol=2)


def attention(make, spectra, key_rows):
    """q, k and v of several blocks, of the effective ranks given."""
    shapes = {"q": (200, 200), "k": (key_rows, 200), "v": (key_rows, 200)}
    return [
        make(role, b, shapes[role], tail := flat_then_zero(min(shapes[role]), r), whitened=tail)
        for b, block in enumerate(spectra)
        for role, r in zip("qkv", block, strict=True)
    ]


def test_d_rank_moves_a_share_of_q_and_k_to_v(make):
    # Equal effective ranks: uniform at 0.3, rank 30 of 100. q and k give 0.2 x 30 = 6 ranks each, v gets 12.
    candidates = attention(make, [(50, 50, 50)] * 3, 200)
    ranks = DRank(moved=0.2).ranks(candidates, Budget(int(0.3 * total(candidates)), dense=False))
    assert {name.split(".")[2]: rank for name, rank in ranks.items()} == {"q": 24, "k": 24, "v": 42}


def test_d_rank_shares_the_pool_evenly_whatever_a_block_gave(make):
    # sqrt(R) = 4 and 8 for q and k: at 0.3 ranks 20 and 40, of which 4 and 8 are given: 12 to each v, not 8 and 16.
    candidates = attention(make, [(16, 16, 50), (64, 64, 50)], 200)
    ranks = DRank(moved=0.2).ranks(candidates, Budget(int(0.3 * total(candidates)), dense=False))
    assert ranks["layers.0.q"] == ranks["layers.0.k"] == 16
    assert ranks["layers.1.q"] == ranks["layers.1.k"] == 32
    assert ranks["layers.0.v"] == ranks["layers.1.v"] == 42


def test_d_rank_gives_back_what_v_cannot_hold(make):
    # Grouped queries. Break-even: q 100 x 400 parameters, k and v 40 x 250 (below 40: 39). At 0.7: q 70, k and v 28.
    # Offered to v: 0.3 (28000 + 7000) = 10500. It holds 39 x 250 = 9750, 2750 more than it has; 7750 go back, 0.8 to q:
    # q 70 - 21 + 6200/400 = 64.5 and k 28 - 8.4 + 1550/250 = 25.8.
    candidates = attention(make, [(50, 20, 20)] * 2, 50)
    budget = Budget(int(0.7 * total(candidates)), dense=False)
    ranks = DRank(moved=0.3).ranks(candidates, budget)
    assert [ranks[f"layers.0.{role}"] for role in "qkv"] == pytest.approx([64.5, 25.8, 39], abs=1.3)
    assert budget.parameters - 400 < spent(candidates, ranks) <= budget.parameters


def test_d_rank_keeps_roles_uniform_where_the_authors_do(make):
    # Effective ranks 10 and 160 of 200, 1:4 by the square root; at 0.5 uniform is 50, dynamic 20 and 80. Every second
    # block's `o` has much more energy, so that its loss falls with dynamic ranks; `up` is the other way round.
    def pair(role, energies):
        return [
            make(role, b, (200, 200), tail := scale * flat_then_zero(200, r), whitened=tail)
            for b, (r, scale) in enumerate(zip((10, 160), energies, strict=True))
        ]

    candidates = [*pair("gate", (1, 1)), *pair("o", (1, 1)), *pair("up", (1, 1))]
    # `up`: one huge component behind rank 20 of the block that dynamic ranks cut hardest.
    candidates[4] = make("up", 0, (200, 200), tail := torch.full((200,), 1.0).double(), whitened=tail)
    candidates[5] = make("up", 1, (200, 200), tail := flat_then_zero(200, 160) * 1e-6, whitened=tail)
    ranks = DRank().ranks(candidates, Budget(int(0.5 * total(candidates)), dense=False))
    assert ranks["layers.0.gate"] == ranks["layers.1.gate"] == 50
    assert (ranks["layers.0.o"], ranks["layers.1.o"]) == (20, 80)
    plain = DRank(guard=False).ranks(candidates, Budget(int(0.5 * total(candidates)), dense=False))
    assert (plain["layers.0.gate"], plain["layers.1.gate"]) == (20, 80)


def test_d_rank_has_nothing_to_move_in_a_merged_projection(make):
    candidates = [make("qkv", b, (96, 32), power(32, 1 + b), whitened=power(32, 1 + b)) for b in range(4)]
    budget = Budget(int(0.5 * total(candidates)))
    assert DRank(moved=0.4).ranks(candidates, budget) == DRank(moved=0).ranks(candidates, budget)


def spent(candidates, ranks):
    return sum(c.cost(ranks[c.name]) for c in candidates)


class BlockProbe:
    """Says that cutting block i costs `losses[i]`."""

    def __init__(self, losses):
        self.losses = losses

    def divergence(self, ranks):
        return self.loss_change(ranks)

    def loss_change(self, ranks):
        [block] = {int(name.split(".")[1]) for name in ranks}
        return float(self.losses[block])


@pytest.mark.parametrize(
    ("alpha", "norms", "losses", "expected"),
    [
        # log(e + eps) is 1, 2 and 3: half of the uniform rank 60 each, the other 90 as 1 : 2 : 3.
        (0.0, (0, e**2 - e, e**3 - e), (0.1, 0.1, 0.1), (45, 60, 75)),
        # Losses scaled to 1..2 are 1, 2 and 1.5: 90 as 2 : 4 : 3.
        (1.0, (0, 5, 7), (0.1, 0.3, 0.2), (50, 70, 60)),
        # sqrt(beta log): sqrt(1 x 4), sqrt(2 x 2) and sqrt(1 x 1): 90 as 2 : 2 : 1.
        (0.5, (e**4 - e, e**2 - e, 0), (0.1, 0.3, 0.1), (66, 66, 48)),
    ],
)
def test_swift_weighs_importance_and_output_size(make, alpha, norms, losses, expected):
    # eps is the norm over 1000 tokens of outputs with this mean square.
    candidates = [
        make("q", b, (200, 200), power(200, 1), whitened=torch.tensor([norm**2 / 1000])) for b, norm in enumerate(norms)
    ]
    rule = Swift(alpha=alpha, floor=0.5, tokens=1000)
    ranks = rule.ranks(candidates, Budget(int(0.6 * total(candidates)), dense=False), BlockProbe(losses))
    assert tuple(ranks.values()) == expected


def test_swift_with_all_weight_on_the_floor_is_uniform(smollm2, tails_probe):
    budget = Budget(int(0.6 * total(smollm2)), multiple=8)
    ranks = Swift(floor=1.0).ranks(smollm2, budget, tails_probe(smollm2))
    assert ranks == Uniform().ranks(smollm2, budget)


def test_swift_measures_one_block_at_a_time(smollm2, tails_probe):
    probe = tails_probe(smollm2)
    Swift().ranks(smollm2, Budget(int(0.6 * total(smollm2)), 8), probe)
    assert len(probe.asked) == 30
    assert all(len({name.split(".")[1] for name in asked}) == 1 and len(asked) == 7 for asked in probe.asked)
    assert Swift().probe


def test_hisvd_anchors_ranks_at_the_root_of_their_density(make):
    # Densities 0.04, 0.36 and 1 of 100: roots as 1 : 3 : 5. At 0.6 uniform is 30, 90 in all: 10, 30
    # and 50, of which the last cannot have more than 49 without costing more than the dense matrix.
    spectra = [flat_then_zero(100, r) for r in (4, 36, 100)]
    candidates = [make("q", b, (100, 100), s, whitened=s) for b, s in enumerate(spectra)]
    budget = Budget(int(0.6 * total(candidates)), dense=False)
    assert list(HiSvd(capacity="density", power=0.5, strength=0).ranks(candidates, budget).values()) == [10, 31, 49]
    assert list(HiSvd(capacity="density", power=0, strength=0).ranks(candidates, budget).values()) == [30, 30, 30]


def test_hisvd_ranks_follow_the_effective_rank_itself(make):
    # R 20 and 40: as ranks 1 : 2 whatever the shapes. 300 + 2 x 200 parameters a unit, 14000 in all: 20 and 40.
    shapes, effective = ((200, 100), (100, 100)), (20, 40)
    candidates = [
        make(role, 0, shape, tail := flat_then_zero(100, r), whitened=tail)
        for role, shape, r in zip(("up", "q"), shapes, effective, strict=True)
    ]
    ranks = HiSvd(capacity="rank", power=1.0, strength=0).ranks(candidates, Budget(14_000, dense=False))
    assert list(ranks.values()) == [20, 40]


def steep_or_flat(steep, head=48):
    """One head, and beyond rank `head` a tail of the same energy in one component or in all of them."""
    tail = torch.zeros(96 - head) if steep else torch.full((96 - head,), 1.0)
    if steep:
        tail[0] = 96 - head
    return torch.cat([torch.full((head,), 1e4), tail]).double()


@pytest.mark.parametrize("redundancy", ["energy", "participation", "slope"])
def test_hisvd_takes_from_redundant_tails_and_keeps_each_clusters_budget(make, redundancy):
    candidates = [make("q", b, (96, 96), s := steep_or_flat(b % 2 == 0, 24), whitened=s) for b in range(12)]
    budget = Budget(int(0.5 * total(candidates)), dense=False)
    rule = HiSvd(capacity="density", power=0, redundancy=redundancy, strength=0.2, depth_ranges=3)
    ranks = rule.ranks(candidates, budget)
    # Two values of tau in equal number: z is 1 and -1. 24 a matrix: 48 as exp(-0.2) to exp(0.2), 19.27 and 28.73.
    assert [ranks[c.name] for c in candidates] == pytest.approx([19.27, 28.73] * 6, abs=1)
    assert spent(candidates, ranks) == budget.parameters
    for first in (0, 4, 8):
        assert sum(ranks[f"layers.{b}.q"] for b in range(first, first + 4)) == pytest.approx(96, abs=1)


def test_hisvd_reads_the_tail_beyond_its_rank_alone(make):
    # Equal tails behind heads of very different concentration: nothing to tell them apart.
    heads = [torch.cat([torch.full((1,), 1e6), torch.full((23,), 2.0)]), torch.full((24,), 1e6)]
    spectra = [torch.cat([head, power(72, 1)]).double() for head in heads]
    candidates = [make("q", b, (96, 96), s, whitened=s) for b, s in enumerate(spectra)]
    budget = Budget(int(0.5 * total(candidates)), dense=False)
    assert set(
        HiSvd(capacity="density", power=0, redundancy="energy", strength=0.5).ranks(candidates, budget).values()
    ) == {24}


def test_hisvd_never_rewards_a_redundant_tail_and_needs_a_forward_pass_alone():
    assert {spectrum.name for spectrum in HiSvd().needs()} == {"whitened"}
    assert all(spectrum.needs().gradient is None for spectrum in HiSvd().needs())
    with pytest.raises(ValidationError, match="strength"):
        HiSvd(strength=-0.1)


def test_energy_svd_grows_with_the_energy_of_the_spectrum(make):
    candidates = [make("q", b, (96, 96), power(96, 1), two_sided=16.0**b * power(96, 1)) for b in range(2)]
    rule = EnergySvd(energy=0.5, attention=None, strength=0)
    ranks = rule.ranks(candidates, Budget(int(0.4 * total(candidates)), dense=False))
    assert ranks["layers.1.q"] / ranks["layers.0.q"] == pytest.approx(4, rel=0.15)


def test_energy_svd_reads_singular_values(make):
    # Squares 1, 1, 0 ... and 9, 1, 0 ...: as singular values p = 1/2, 1/2 and 3/4, 1/4.
    effective = [2.0, 4 / 3**0.75]
    spectra = [torch.tensor(s + [0.0] * 998).double() for s in ([1.0, 1.0], [9.0, 1.0])]
    candidates = [make("q", b, (1000, 1000), s, two_sided=s) for b, s in enumerate(spectra)]
    rule = EnergySvd(energy=0, attention=None, strength=0)
    ranks = list(rule.ranks(candidates, Budget(int(0.9 * total(candidates)), dense=False)).values())
    assert ranks[0] / ranks[1] == pytest.approx((effective[0] / effective[1]) ** 0.5, abs=0.005)


def test_energy_svd_keeps_attention_and_mlp_in_proportion(smollm2):
    ranks = EnergySvd(energy=0, attention=0.8, strength=0).ranks(smollm2, Budget(int(0.3 * total(smollm2)), 1))
    kept = {}
    for family, roles in (("attention", "q k v o"), ("mlp", "gate up down")):
        members = [c for c in smollm2 if c.role in roles.split()]
        kept[family] = spent(members, ranks) / total(members)
    assert kept["attention"] / kept["mlp"] == pytest.approx(0.8, abs=0.02)


def test_energy_svd_gives_more_to_concentrated_spectra(make):
    # tau at rank 24: 0.9 of the energy in one component (23/24) or in 22 of 24 equal ones (1/12).
    spectra = [torch.cat([torch.full((1,), 1e8), torch.ones(95)]), torch.ones(96)]
    candidates = [make("q", b, (96, 96), spectra[b % 2].double(), two_sided=spectra[b % 2].double()) for b in range(4)]
    budget = Budget(int(0.5 * total(candidates)), dense=False)
    plain = EnergySvd(energy=0, attention=None, strength=0).ranks(candidates, budget)
    rewarded = EnergySvd(energy=0, attention=None, strength=-0.3, depth_ranges=1).ranks(candidates, budget)
    assert rewarded["layers.0.q"] > plain["layers.0.q"]
    assert rewarded["layers.1.q"] < plain["layers.1.q"]
