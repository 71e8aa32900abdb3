"""KFAC-SVD: `B^(1/2) W C^(1/2)` cut and undone, B from the gradients at the outputs, C from the inputs."""

import numpy as np
import pytest

from lowrank_kit.allocations import lagrangian as module
from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.two_sided import TwoSided

ONE = "model.layers.1.mlp.up_proj"
LEMS = {"gradient_shrinkage": 0.3, "input_shrinkage": 0.1, "gradient_clipping": (0.1, 10.0), "window_margin": 0.125}


def roots(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def shrunk(matrix, share):
    return (1 - share) * matrix + share * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def gradient_moment(layer, clipping, margin):
    """As in LEMS: positions at either end are left out, then the norms of the others are clipped about their mean."""
    total = 0
    for g in layer.gradients:
        out = int(len(g) * margin)
        g = g[out : len(g) - out]
        if clipping:
            norms = np.sqrt((g**2).sum(1))
            wanted = np.clip(norms, clipping[0] * norms.mean(), clipping[1] * norms.mean())
            g = g * np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]
        total = total + g.T @ g
    return total


def metric(layer, gradient_shrinkage=0.01, input_shrinkage=0.0, gradient_clipping=None, window_margin=0.0):
    b = shrunk(gradient_moment(layer, gradient_clipping, window_margin), gradient_shrinkage)
    return roots(b), roots(shrunk(layer.x.T @ layer.x, input_shrinkage))


@pytest.mark.parametrize("options", [{}, LEMS], ids=["default", "as published"])
def test_a_matrix_and_a_model_are_cut_in_the_metric_of_the_loss(options, model, work, seen, cut, same_model):
    method = TruncatedSVD(name="x", ratio=0.4, rank_multiple=1, allocation=Uniform(), truncation=TwoSided(**options))
    plan, compressed = work(model, method)
    expected = {}
    for name, layer in seen(model).items():
        (b, b_inverse), (c, c_inverse) = metric(layer, **options)
        expected[name] = b_inverse @ cut(b @ layer.weight @ c, plan.ranks[name]) @ c_inverse
    one = compressed.get_submodule(ONE).dense_weight().detach().double().numpy()
    assert np.linalg.norm(one - expected[ONE]) <= 2e-3 * np.linalg.norm(expected[ONE])
    same_model(compressed, model, expected)


def test_one_multiplier_decides_every_rank(model, work, seen, monkeypatch):
    """Ours: each matrix takes the rank, or stays dense, where `tail + mu cost` is least; mu by bisection."""
    seen_options, ranks, options_of, relax = {}, {}, module.options_of, module.relax

    def noted_options(candidates, budget):
        found = options_of(candidates, budget)
        seen_options.update({c.name: o for c, o in zip(candidates, found, strict=True)})
        return found

    def noted(costs, losses, budget):
        found = relax(costs, losses, budget)
        ranks.update({name: o.ranks[i] for (name, o), i in zip(seen_options.items(), found.chosen, strict=True)})
        return found

    monkeypatch.setattr(module, "options_of", noted_options)
    monkeypatch.setattr(module, "relax", noted)
    allocation = {"allocation": Lagrangian(), "truncation": TwoSided(), "dense": True}
    work(model, TruncatedSVD(name="x", ratio=0.4, rank_multiple=1, **allocation))
    layers, options = seen(model), {}
    for name, layer in layers.items():
        (b, _), (c, _) = metric(layer)
        squares = np.linalg.svd(b @ layer.weight @ c, compute_uv=False) ** 2
        rows, columns = layer.weight.shape
        below = range(1, -(-rows * columns // (rows + columns)))
        options[name] = [(squares[k:].sum(), k * (rows + columns), k) for k in below]
        options[name].append((0.0, rows * columns, min(rows, columns)))
    budget = 0.6 * sum(layer.weight.size for layer in layers.values())
    low, high = 0.0, 1e6

    def chosen(mu):
        return {name: min(found, key=lambda o: o[0] + mu * o[1]) for name, found in options.items()}

    for _ in range(200):
        middle = (low + high) / 2
        within = sum(cost for _, cost, _ in chosen(middle).values()) <= budget
        low, high = (low, middle) if within else (middle, high)
    assert ranks == {name: rank for name, (_, _, rank) in chosen(high).items()}
