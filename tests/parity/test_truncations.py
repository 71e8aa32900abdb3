"""One matrix and one model cut by each published metric, against the formula of its paper.

Every form here undoes a weighting S that it can invert: `W' = svd_k(W S) S^-1`. The package projects instead and takes
no inverse, so that nothing but the mathematics is common to both.
"""

import numpy as np
import pytest
import torch

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.fisher import Fisher
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.plain import Plain
from lowrank_kit.truncations.scaled import Scaled

ONE = "model.layers.1.mlp.up_proj"


def plain(layer):
    return np.eye(layer.weight.shape[1])


def fwsvd(layer):
    """Arxiv 2207.00112, equations 4 to 6: the paper's W is [in, out], so its rows are the INPUTS."""
    information = np.zeros(layer.weight.shape[1])
    for x, g in zip(layer.inputs, layer.gradients, strict=True):
        information += ((g.T @ x) ** 2).sum(0)  # of one sample's gradient [out, in]
    return np.diag(np.sqrt(information))


def asvd(layer):
    """Arxiv 2312.05821, equation 9, with alpha = 0.5."""
    return np.diag(np.abs(layer.x).mean(0) ** 0.5)


def svd_llm(layer):
    """Arxiv 2403.07378, section 3.1: the Cholesky factor of X X^T."""
    return np.linalg.cholesky(layer.x.T @ layer.x)


CASES = [(Plain(), plain), (Fisher(), fwsvd), (Scaled(), asvd), (Optimal(), svd_llm)]


@pytest.mark.parametrize(("truncation", "weighting"), CASES, ids=["svd", "fwsvd", "asvd", "svd_llm"])
def test_a_matrix_and_a_model_are_cut_as_in_the_paper(truncation, weighting, model, work, seen, cut, same_model):
    settings = {"name": "x", "ratio": 0.4, "rank_multiple": 1, "allocation": Uniform(), "truncation": truncation}
    plan, compressed = work(model, TruncatedSVD(**settings))
    expected = {}
    for name, layer in seen(model).items():
        s = weighting(layer)
        rows, columns = layer.weight.shape
        # Uniform: every matrix keeps the same share of its parameters, to one rank.
        assert abs(plan.ranks[name] - 0.6 * rows * columns / (rows + columns)) <= 1
        expected[name] = cut(layer.weight @ s, plan.ranks[name]) @ np.linalg.inv(s)
    one = compressed.get_submodule(ONE).dense_weight().detach().double().numpy()
    assert np.linalg.norm(one - expected[ONE]) <= 1e-3 * np.linalg.norm(expected[ONE])
    same_model(compressed, model, expected)


def test_the_weighted_form_is_the_best_one_in_its_own_norm(model, work, seen):
    """A second look at FWSVD: no other matrix of this rank has a smaller weighted error, along random directions."""
    settings = {"name": "x", "ratio": 0.4, "rank_multiple": 1, "allocation": Uniform(), "truncation": Fisher()}
    plan, compressed = work(model, TruncatedSVD(**settings))
    layer, rank = seen(model)[ONE], plan.ranks[ONE]
    weights = np.diag(fwsvd(layer))
    module = compressed.get_submodule(ONE)
    up, down = (part.weight.detach().double().numpy() for part in (module.up, module.down))
    draw = np.random.default_rng(0)

    def error(up, down):
        return (((layer.weight - up @ down) * weights) ** 2).sum()

    assert up.shape[1] == rank
    for _ in range(50):
        step = 1e-3 * draw.normal(size=up.shape) * np.abs(up).mean()
        assert error(up + step, down) >= error(up, down) * (1 - 1e-6)
        step = 1e-3 * draw.normal(size=down.shape) * np.abs(down).mean()
        assert error(up, down + step) >= error(up, down) * (1 - 1e-6)
    assert torch.isfinite(module.up.weight).all()
