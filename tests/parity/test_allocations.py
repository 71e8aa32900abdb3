"""Who gets which rank, against the formulas of the papers, from what an observer sees of the model.

With multiples of one, a rule that shares out a budget may round each ideal rank to one of its neighbours, no more;
the ideal itself is compared too, as on so small a model rounding would hide most mistakes.
"""

from math import e, log

import numpy as np
import pytest

from lowrank_kit.allocations import asvd as strs_module
from lowrank_kit.allocations import d_rank as d_rank_module
from lowrank_kit.allocations import svd_llm_v2 as v2_module
from lowrank_kit.allocations import swift as swift_module
from lowrank_kit.allocations import zs_svd as zs_module
from lowrank_kit.allocations.asvd import Strs
from lowrank_kit.allocations.d_rank import DRank
from lowrank_kit.allocations.svd_llm_v2 import SvdLlmV2
from lowrank_kit.allocations.swift import Swift
from lowrank_kit.allocations.zs_svd import ZeroSum
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.scaled import Scaled

RATIO = 0.4


def settings(**given):
    return TruncatedSVD(**{"name": "x", "ratio": RATIO, "rank_multiple": 1, "truncation": Optimal()} | given)


def role_of(name):
    return name.rpartition(".")[2].removesuffix("_proj")


def break_even(layer):
    rows, columns = layer.weight.shape
    return rows * columns / (rows + columns)


def whitened(layer):
    """Singular values of W over the calibration tokens, and the Cholesky factor that whitens its inputs."""
    s = np.linalg.cholesky(layer.x.T @ layer.x)
    return np.linalg.svd(layer.weight @ s, compute_uv=False), s


@pytest.fixture
def started(monkeypatch):
    """The ranks that a rule hands over before what is left of the budget is spent step by step, which is ours."""
    kept = {}

    def spy(module):
        finish = module.finish

        def noted(candidates, budget, options, start, urgency):
            kept.update({c.name: o.ranks[i] for c, o, i in zip(candidates, options, start, strict=True)})
            return finish(candidates, budget, options, start, urgency)

        monkeypatch.setattr(module, "finish", noted)
        return kept

    return spy


@pytest.fixture
def wanted(monkeypatch):
    """The shares of the budget that a rule wants, before they are rounded to ranks: `wanted(module)` by name."""
    kept = {}

    def spy(module):
        proportional = module.proportional

        def noted(candidates, budget, weights):
            kept.update({c.name: weight / sum(weights) for c, weight in zip(candidates, weights, strict=True)})
            return proportional(candidates, budget, weights)

        monkeypatch.setattr(module, "proportional", noted)
        return kept

    return spy


def assert_shares(shares, ideal, layers, plan):
    """The ideal ranks cost these shares of the budget, and each has been rounded to one of its neighbours."""
    costs = {name: rank * sum(layers[name].weight.shape) for name, rank in ideal.items()}
    assert shares == pytest.approx({name: cost / sum(costs.values()) for name, cost in costs.items()}, rel=2e-4)
    assert all(abs(plan.ranks[name] - rank) <= 1.01 for name, rank in ideal.items())


def test_svd_llm_v2_cuts_by_one_over_log_loss(model, work, seen, wanted):
    """Arxiv 2503.12340, algorithm 1: in a role, ratio_i = n R (1 / log L_i) / sum (1 / log L), L the error at R."""
    shares = wanted(v2_module)
    plan, _ = work(model, settings(allocation=SvdLlmV2()))
    layers, ideal = seen(model), {}
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        members = [name for name in layers if role_of(name) == role]
        inverse = {}
        for name in members:
            values, _ = whitened(layers[name])
            rank = int((1 - RATIO) * break_even(layers[name]))
            # The paper sums over 524288 tokens.
            loss = np.sqrt((values[rank:] ** 2).sum() * 524288 / len(layers[name].x))
            inverse[name] = 1 / log(loss)
        for name in members:
            removed = len(members) * RATIO * inverse[name] / sum(inverse.values())
            ideal[name] = (1 - removed) * break_even(layers[name])
    assert_shares(shares, ideal, layers, plan)


def test_d_rank_follows_the_root_of_the_effective_rank(model, work, seen, wanted):
    """Arxiv 2509.25622, sections 3.1 and 3.2: k ~ sqrt(R / (out + in)) within a role, R of the whitened spectrum."""
    shares = wanted(d_rank_module)
    plan, _ = work(model, settings(allocation=DRank(moved=0.0, guard=False), dense=False))
    layers, ideal = seen(model), {}
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        members = [name for name in layers if role_of(name) == role]
        root = {}
        for name in members:
            values, _ = whitened(layers[name])
            p = values**2 / (values**2).sum()
            root[name] = np.sqrt(np.exp(-(p * np.log(p)).sum()) / sum(layers[name].weight.shape))
        cost = sum(layers[members[0]].weight.shape)
        budget = (1 - RATIO) * len(members) * layers[members[0]].weight.size
        for name in members:
            ideal[name] = root[name] * budget / (cost * sum(root.values()))
    assert_shares(shares, ideal, layers, plan)


def test_d_rank_gives_v_what_it_can_take_of_q_and_k(model, work, seen, wanted):
    """Section 3.3, with grouped queries: a share of all q and k is pooled, divided among the v, what they cannot hold
    goes back. This model's v, half as tall as its q, is offered more than it can hold."""
    before, _ = work(model, settings(allocation=DRank(moved=0.0, guard=False), dense=True))
    shares = wanted(d_rank_module)
    plan, _ = work(model, settings(allocation=DRank(moved=0.3, guard=False), dense=True))
    layers = seen(model)
    cost = {n: min(before.ranks[n] * sum(layers[n].weight.shape), layers[n].weight.size) for n in layers}
    of = {role: [n for n in layers if role_of(n) == role] for role in ("q", "k", "v")}
    gift = {role: 0.3 * sum(cost[n] for n in of[role]) for role in ("q", "k")}
    gain = {n: min((gift["q"] + gift["k"]) / 3, layers[n].weight.size - cost[n]) for n in of["v"]}
    left = gift["q"] + gift["k"] - sum(gain.values())
    assert left > 0
    after = dict(cost) | {n: cost[n] + gain[n] for n in of["v"]}
    for role in ("q", "k"):
        for n in of[role]:
            after[n] = 0.7 * cost[n] + left * gift[role] / (gift["q"] + gift["k"]) / 3
    assert shares == pytest.approx({n: c / sum(after.values()) for n, c in after.items()}, rel=1e-6)
    assert all(plan.ranks[n] == min(layers[n].weight.shape) for n in of["v"])


def test_swift_shares_half_by_importance_and_output_norm(model, work, seen, cut, loss, replaced, wanted, probe_rows):
    """Arxiv 2604.01609: half of the uniform rank, the rest by beta^a log(e + eps)^(1 - a), a = 0.6, role by role.

    beta, from 1 to 2 over the blocks, is by default OURS: the loss that is measured with that block alone cut.
    """
    shares = wanted(swift_module)
    plan, _ = work(model, settings(allocation=Swift(), dense=False), probe_rows)
    layers, beta, ideal = seen(model), [], {}
    for block in range(3):
        cuts = {}
        for name, layer in layers.items():
            if f".{block}." in name:
                _, s = whitened(layer)
                cuts[name] = cut(layer.weight @ s, int((1 - RATIO) * break_even(layer))) @ np.linalg.inv(s)
        beta.append(loss(replaced(model, cuts)) - loss(model))
    beta = [1 + (b - min(beta)) / (max(beta) - min(beta)) for b in beta]
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        members = [name for name in layers if role_of(name) == role]
        score = {}
        for block, name in enumerate(members):
            norm = np.sqrt((whitened(layers[name])[0] ** 2).sum() * 524288 / len(layers[name].x))
            score[name] = beta[block] ** 0.6 * log(e + norm) ** 0.4
        for name in members:
            uniform = (1 - RATIO) * break_even(layers[name])
            ideal[name] = 0.5 * uniform + 0.5 * uniform * len(members) * score[name] / sum(score.values())
    assert_shares(shares, ideal, layers, plan)


def test_zero_sum_walks_from_component_to_component(model, work, seen, started):
    """Arxiv 2602.02848, algorithm 1: take the smallest change of the sign that leads the running sum back to zero."""
    ranks = started(zs_module)
    work(model, settings(allocation=ZeroSum(floor=0.0), dense=True))
    layers = seen(model)
    changes, left, budget, total = {}, {}, 0.0, 0.0
    for name, layer in layers.items():
        _, s = whitened(layer)
        u, values, vh = np.linalg.svd(layer.weight @ s, full_matrices=False)
        parts = [values[k] * np.outer(u[:, k], vh[k] @ np.linalg.inv(s)) for k in range(len(values))]
        changes[name] = [-(layer.mean_gradient * part).sum() for part in parts]
        left[name] = len(values)
        budget += (1 - RATIO) * layer.weight.size

    def cost(name):
        return min(left[name] * sum(layers[name].weight.shape), layers[name].weight.size)

    while sum(cost(name) for name in layers) > budget:
        ends = {name: changes[name][left[name] - 1] for name in layers if left[name] > 1}
        wanted = {name: c for name, c in ends.items() if (c >= 0) == (total <= 0)} or ends
        name = min(wanted, key=lambda name: abs(wanted[name]))
        total += wanted[name]
        left[name] -= 1
    for name, layer in layers.items():
        dense = left[name] * sum(layer.weight.shape) >= layer.weight.size
        assert ranks[name] == (min(layer.weight.shape) if dense else left[name]), name


def test_asvd_searches_one_threshold_of_the_measured_loss(model, work, seen, cut, loss, replaced, started, probe_rows):
    """Arxiv 2312.05821, algorithm 1 (STRS): every matrix alone at every share, then one threshold for all."""
    grid, ranks = (0.3, 0.6, 0.9), started(strs_module)
    work(model, settings(truncation=Scaled(), allocation=Strs(grid=grid), dense=True), probe_rows)
    layers, measured, dense = seen(model), {}, loss(model)
    for name, layer in layers.items():
        s = np.diag(np.abs(layer.x).mean(0) ** 0.5)
        for share in grid:
            found = cut(layer.weight @ s, int(share * break_even(layer))) @ np.linalg.inv(s)
            measured[name, share] = loss(replaced(model, {name: found})) - dense
    budget = (1 - RATIO) * sum(layer.weight.size for layer in layers.values())
    for threshold in sorted(measured.values()):
        shares = {n: min([s for s in grid if measured[n, s] <= threshold], default=1) for n in layers}
        cut_ranks = {n: int(shares[n] * break_even(layer)) for n, layer in layers.items() if shares[n] < 1}
        spent = sum(
            cut_ranks[n] * sum(layer.weight.shape) if n in cut_ranks else layer.weight.size
            for n, layer in layers.items()
        )
        if spent <= budget:
            break
    assert ranks == {n: cut_ranks.get(n, min(layer.weight.shape)) for n, layer in layers.items()}
