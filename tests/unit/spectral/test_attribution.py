import numpy as np
import pytest
import torch

from lowrank_kit.spectral.attribution import drop_change, sigma_gradient
from lowrank_kit.spectral.eigenpairs import random_orthonormal, svd
from lowrank_kit.spectral.factors import LowRankFactors


def layer(out=9, width=6):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, dtype=torch.float64, generator=generator)
    x = torch.randn(40, width, dtype=torch.float64, generator=generator)
    labels = torch.randint(out, (40,), generator=generator)
    return weight, lambda w: torch.nn.functional.cross_entropy(torch.tanh(x @ w.T), labels)


def gradient_of(weight, loss):
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(loss(weight), weight)[0]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_sigma_gradient_is_autograd_through_an_explicit_svd_layer(shape):
    weight, loss = layer(*shape)
    u, s, vh = svd(weight)
    sigma = s.clone().requires_grad_()
    expected = torch.autograd.grad(loss(u * sigma @ vh), sigma)[0]
    np.testing.assert_allclose(sigma_gradient(u, vh.T, gradient_of(weight, loss)), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_drop_change_is_the_slope_of_shrinking_a_component(shape):
    weight, loss = layer(*shape)
    u, s, vh = svd(weight)
    gradient = gradient_of(weight, loss)
    changes = drop_change(LowRankFactors(u * s, vh), gradient)
    np.testing.assert_allclose(changes, -s * sigma_gradient(u, vh.T, gradient), rtol=1e-9)
    check_slopes(changes, u * s, vh, weight, loss)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_drop_change_is_the_slope_of_shrinking_a_projection(shape):
    weight, loss = layer(*shape)
    u = random_orthonormal(shape[0], 4, 0)
    check_slopes(drop_change(LowRankFactors(u, u.T @ weight), gradient_of(weight, loss)), u, u.T @ weight, weight, loss)


def check_slopes(changes, up, down, weight, loss):
    step = 1e-5
    for k, change in enumerate(changes):
        part = torch.outer(up[:, k], down[k])
        slope = (loss(weight - step * part) - loss(weight + step * part)) / (2 * step)
        assert float(change) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)
