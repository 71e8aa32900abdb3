"""Rules that read spectra alone: svd_llm_v2, d_rank, swift, hisvd."""

from math import e, log

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lowrank_kit.allocation.base import Budget
from lowrank_kit.allocation.d_rank import DRank
from lowrank_kit.allocation.hisvd import HiSvd
from lowrank_kit.allocation.svd_llm_v2 import SvdLlmV2
from lowrank_kit.allocation.swift import Swift
from lowrank_kit.allocation.uniform import Uniform


def power(count, exponent, scale=1.0):
    return scale * torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def total(candidates):
    return sum(c.dense_cost for c in candidates)


def parameters(candidates, ranks):
    return {c.name: c.cost(ranks[c.name]) for c in candidates}


def test_svd_llm_v2_gives_the_published_ratios(make):
    tails = [power(400, 0.3, s) for s in (1e3, 1.0, 1e-3)]
    candidates = [make("q", b, (400, 400), tail) for b, tail in enumerate(tails)]
    keep, tokens = 0.5, 10**6
    ranks = SvdLlmV2(tokens=tokens).ranks(candidates, Budget(int(keep * total(candidates)), dense=False))
    loss = np.array([np.sqrt(tokens * tail[int(keep * 200) :].sum().item()) for tail in tails])
    removed = 3 * (1 - keep) * (1 / np.log(loss)) / (1 / np.log(loss)).sum()
    found = [ranks[c.name] for c in candidates]
    # The published rule has log L, this one log(1 + L): a third of a rank at these losses.
    np.testing.assert_allclose(found, (1 - removed) * 200, atol=1.5)
    assert found[0] > found[1] > found[2]


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
    cost = np.array([c.cost_per_rank for c in candidates])
    r = np.array([effective[c.role] for c in candidates])
    budget = 60_000
    best = minimize(
        lambda k: (r / k).sum(),
        x0=np.full(3, 20.0),
        bounds=[(1, None)] * 3,
        constraints={"type": "eq", "fun": lambda k: (cost * k).sum() / budget - 1},
        options={"ftol": 1e-12},
    ).x
    ranks = DRank(scope="global", moved=0).ranks(candidates, Budget(budget))
    np.testing.assert_allclose([ranks[c.name] for c in candidates], best, atol=2)


def test_d_rank_moves_a_share_of_q_and_k_to_v(smollm2):
    budget = Budget(int(0.3 * total(smollm2)), dense=False)
    before = parameters(smollm2, DRank(moved=0).ranks(smollm2, budget))
    after = parameters(smollm2, DRank(moved=0.3).ranks(smollm2, budget))
    step = max(c.cost_per_rank for c in smollm2)
    capped = False
    for block in range(30):
        q, k, v = (f"layers.{block}.{role}" for role in "qkv")
        gained = before[v] + 0.3 * (before[q] + before[k])
        cap = next(c.break_even * c.cost_per_rank for c in smollm2 if c.name == v)
        capped |= gained > cap
        assert after[v] >= min(gained, cap) - 2 * step
    assert sum(after.values()) == pytest.approx(sum(before.values()), abs=2 * step)
    if not capped:
        assert all(abs(after[n] - 0.7 * before[n]) < 2 * step for n in before if n.endswith((".q", ".k")))


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

    def loss_change(self, ranks):
        [block] = {int(name.split(".")[1]) for name in ranks}
        return float(self.losses[block])


def test_swift_follows_its_formula(make):
    sizes, losses = np.array([1.0, 50.0, 400.0]), np.array([0.3, 0.1, 0.2])
    candidates = [
        make("q", b, (200, 200), power(200, 1), whitened=torch.tensor([size])) for b, size in enumerate(sizes)
    ]
    rule = Swift(alpha=0.6, floor=0.5, tokens=1000)
    ranks = rule.ranks(candidates, Budget(int(0.5 * total(candidates)), dense=False), BlockProbe(losses))
    beta = 1 + (losses - 0.1) / 0.2
    score = beta**0.6 * np.log(e + np.sqrt(1000 * sizes)) ** 0.4
    expected = 50 * (0.5 + 0.5 * 3 * score / score.sum())
    np.testing.assert_allclose([ranks[c.name] for c in candidates], expected, atol=1)


def test_swift_with_all_weight_on_the_floor_is_uniform(smollm2, tails_probe):
    budget = Budget(int(0.6 * total(smollm2)), multiple=8)
    ranks = Swift(floor=1.0).ranks(smollm2, budget, tails_probe(smollm2))
    assert ranks == Uniform().ranks(smollm2, budget)


def test_swift_measures_one_block_at_a_time(smollm2, tails_probe):
    probe = tails_probe(smollm2)
    Swift().ranks(smollm2, Budget(int(0.6 * total(smollm2)), 8), probe)
    assert len(probe.asked) == 30
    assert all(len({name.split(".")[1] for name in asked}) == 1 and len(asked) == 7 for asked in probe.asked)
    assert Swift().needs_probe
    assert log(e) == 1


# The rule by the public description alone: the shape of one spectrum, all matrices in one budget.
PUBLIC = {"spectrum": "whitened", "exponent": 2, "energy": 0.0, "attention": None}


def test_hisvd_without_refinement_is_its_first_stage(smollm2):
    budget = Budget(int(0.5 * total(smollm2)), 8)
    anchored = HiSvd(**PUBLIC, strength=0).ranks(smollm2, budget)
    assert anchored == DRank(scope="global", moved=0).ranks(smollm2, budget)
    density = HiSvd(**PUBLIC, strength=0, capacity="density", alpha=0).ranks(smollm2, budget)
    assert density == Uniform().ranks(smollm2, budget)


def test_hisvd_takes_from_redundant_tails_and_keeps_each_clusters_budget(make):
    # Equal effective ranks; matrices of even blocks have their energy in a few components before a long flat tail.
    spectra = [torch.cat([torch.full((4,), 40.0), torch.ones(92)]), torch.full((96,), 1.0)]
    candidates = [make("q", b, (96, 96), spectra[b % 2].double(), whitened=spectra[b % 2].double()) for b in range(12)]
    budget = Budget(int(0.5 * total(candidates)), dense=False)
    settings = {**PUBLIC, "capacity": "density", "alpha": 0.0, "depth_ranges": 3, "eta": 0.7}
    anchored = HiSvd(strength=0, **settings).ranks(candidates, budget)
    penalised = HiSvd(strength=0.2, **settings).ranks(candidates, budget)
    rewarded = HiSvd(strength=-0.2, **settings).ranks(candidates, budget)
    for b, c in enumerate(candidates):
        sign = 1 if b % 2 else -1
        assert sign * (penalised[c.name] - anchored[c.name]) > 0
        assert sign * (rewarded[c.name] - anchored[c.name]) < 0
    # Two values of tau in equal number: z is 1 and -1, so the ranks stand as exp(-0.2) to exp(0.2).
    assert penalised["layers.0.q"] / penalised["layers.1.q"] == pytest.approx(np.exp(-0.4), rel=0.06)
    for start in (0, 4, 8):
        cluster = candidates[start : start + 4]
        assert sum(penalised[c.name] for c in cluster) == pytest.approx(sum(anchored[c.name] for c in cluster), abs=4)


def test_hisvd_slope_counts_a_steep_tail_as_redundant(make):
    spectra = [power(96, 0.2), power(96, 3.0)]
    candidates = [make("q", b, (96, 96), spectra[b], whitened=spectra[b]) for b in range(2)]
    budget = Budget(int(0.5 * total(candidates)), dense=False)
    settings = {**PUBLIC, "capacity": "density", "alpha": 0.0, "depth_ranges": 1, "redundancy": "slope"}
    ranks = HiSvd(strength=0.3, **settings).ranks(candidates, budget)
    assert ranks["layers.0.q"] > ranks["layers.1.q"]


def test_hisvd_anchors_grow_with_the_energy_of_the_spectrum(make):
    candidates = [make("q", b, (96, 96), power(96, 1), whitened=16.0**b * power(96, 1)) for b in range(2)]
    rule = HiSvd(**{**PUBLIC, "energy": 0.5}, strength=0)
    ranks = rule.ranks(candidates, Budget(int(0.4 * total(candidates)), dense=False))
    assert ranks["layers.1.q"] / ranks["layers.0.q"] == pytest.approx(4, rel=0.15)


def test_hisvd_keeps_attention_and_mlp_in_proportion(smollm2):
    rule = HiSvd(**{**PUBLIC, "attention": 0.8, "capacity": "density", "alpha": 0.0}, strength=0)
    ranks = rule.ranks(smollm2, Budget(int(0.3 * total(smollm2)), 1))
    kept = {}
    for family, roles in (("attention", "q k v o"), ("mlp", "gate up down")):
        members = [c for c in smollm2 if c.role in roles.split()]
        kept[family] = spent(members, ranks) / total(members)
    assert kept["attention"] / kept["mlp"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("spectrum", ["weight", "whitened", "two_sided"])
def test_hisvd_reads_the_spectrum_it_asks_for(make, spectrum):
    public = {**PUBLIC, "spectrum": spectrum, "strength": 0}
    rule = HiSvd(**public)
    assert rule.needs() == {spectrum}
    candidates = [make("q", b, (96, 96), torch.ones(96), **{spectrum: power(96, b)}) for b in range(3)]
    ranks = rule.ranks(candidates, Budget(int(0.5 * total(candidates)), dense=False))
    assert ranks["layers.0.q"] > ranks["layers.1.q"] > ranks["layers.2.q"]
    values = HiSvd(**{**public, "exponent": 1})
    milder = values.ranks(candidates, Budget(int(0.5 * total(candidates)), dense=False))
    assert milder["layers.2.q"] > ranks["layers.2.q"]
