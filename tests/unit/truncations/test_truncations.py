"""Truncations against the SVD of the scaled weight, by numpy in float64."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lowrank_kit.calibration.statistics import GradientStatistics, LayerStatistics
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.truncations.fisher import Fisher
from lowrank_kit.truncations.truncation import Layer
from lowrank_kit.truncations.two_sided import TwoSided

SHAPES = [(24, 40), (40, 40), (64, 24)]
RANK = 7


def drawn(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, columns, dtype=torch.float64)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator) * scales


def layer_of(weight, gradient, moments=None):
    out_features, in_features = weight.shape
    ref = LinearRef("linear", 0, "up", in_features, out_features, False, "group")
    return Layer(weight, None, LayerStatistics(ref, "input", moments or Moments.zeros(0), gradient=gradient))


def root_of(gram):
    values, vectors = np.linalg.eigh(gram)
    return (vectors * np.sqrt(values)) @ vectors.T


def best(left, weight, right):
    """The rank-7 matrix nearest to W in `|left (W - W') right|`, and the squared singular values."""
    u, s, vh = np.linalg.svd(left @ weight @ right)
    cut = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    return np.linalg.inv(left) @ cut @ np.linalg.inv(right), s**2


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_fwsvd_weights_the_inputs(shape):
    """`W diag(sqrt(I))`, I the Fisher information of every input (arXiv 2207.00112, with W as [in, out])."""
    weight, fisher = drawn(*shape, seed=0), torch.logspace(0, -3, shape[1], dtype=torch.float64)
    projection = Fisher().project([layer_of(weight, GradientStatistics(fisher=fisher))])
    up, down = projection.factors(weight, RANK)
    expected, values = best(np.eye(shape[0]), weight.numpy(), np.diag(np.sqrt(fisher.numpy())))
    np.testing.assert_allclose((up @ down).numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(projection.values.numpy(), values[: min(shape)], rtol=1e-6, atol=1e-14 * values[0])


@pytest.mark.parametrize("shrinkage", [(0.01, 0.0), (0.3, 0.1)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_two_sided_is_the_svd_between_the_roots_of_the_shrunk_moments(shape, shrinkage):
    weight, x, g = drawn(*shape, seed=0), drawn(300, shape[1], seed=1), drawn(200, shape[0], seed=2)
    b, c = g.T @ g / len(g), x.T @ x / len(x)
    seen = b if shape[0] <= shape[1] else weight.T @ b @ weight
    moments = Moments.zeros(shape[1])
    moments.update(x)
    layer = layer_of(weight, GradientStatistics(gram=seen, energy=float(b.trace())), moments)
    of_b, of_c = shrinkage
    projection = TwoSided(gradient_shrinkage=of_b, input_shrinkage=of_c).project([layer])
    left, right = (
        root_of((1 - a) * gram.numpy() + a * np.mean(np.diag(gram)) * np.eye(len(gram)))
        for a, gram in ((of_b, b), (of_c, c))
    )
    up, down = projection.factors(weight, RANK)
    expected, values = best(left, weight.numpy(), right)
    np.testing.assert_allclose((up @ down).numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(projection.values.numpy(), values[: min(shape)], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_one_sided_role_is_cut_by_its_inputs_in_the_units_of_the_loss(shape):
    """B is its mean diagonal times the identity: the optimal truncation, and its values times that."""
    weight, x, g = drawn(*shape, seed=0), drawn(300, shape[1], seed=1), drawn(200, shape[0], seed=2)
    b, c = g.T @ g / len(g), x.T @ x / len(x)
    seen = b if shape[0] <= shape[1] else weight.T @ b @ weight
    moments = Moments.zeros(shape[1])
    moments.update(x)
    layer = layer_of(weight, GradientStatistics(seen, float(b.trace()), b.diagonal()), moments)
    truncation, mean = TwoSided(one_sided=("up",)), float(b.diagonal().mean())
    projection = truncation.project([layer])
    up, down = projection.factors(weight, RANK)
    expected, values = best(np.eye(shape[0]), weight.numpy(), root_of(c.numpy()))
    np.testing.assert_allclose((up @ down).numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(projection.values.numpy(), mean * values[: min(shape)], rtol=1e-6)
    rows, columns = truncation.diagonals(layer)
    np.testing.assert_allclose(rows.numpy(), mean)
    np.testing.assert_allclose(columns.numpy(), c.diagonal().numpy())
    rows, _ = TwoSided(gradient_shrinkage=0.25, one_sided=("q",)).diagonals(layer)
    np.testing.assert_allclose(rows.numpy(), 0.75 * b.diagonal().numpy() + 0.25 * mean)


@pytest.mark.parametrize("bounds", [(1.5, 2.0), (0.1, 0.9), (-0.1, 10.0)])
def test_bounds_that_do_not_enclose_the_mean_norm_are_refused(bounds):
    with pytest.raises(ValidationError, match="enclose the mean norm"):
        TwoSided(gradient_clipping=bounds)


def test_what_it_collects_follows_from_its_options():
    plain, lems = TwoSided().needs(), TwoSided(input_shrinkage=0.1, gradient_clipping=(0.1, 10.0)).needs()
    assert (plain.moments, lems.moments) == ("smaller", "input")
    assert lems.gradient.clipping == (0.1, 10.0)
