import numpy as np
import pytest
import torch

from lowrank_kit.spectral.attribution import projection_drop_change, sigma_gradient, singular_drop_change
from lowrank_kit.spectral.decompose import random_orthonormal, svd


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
def test_singular_drop_change_is_the_slope_of_shrinking_a_component(shape):
    weight, loss = layer(*shape)
    u, s, vh = svd(weight)
    changes = singular_drop_change(u, s, vh.T, gradient_of(weight, loss))
    step = 1e-5
    for k, change in enumerate(changes):
        component = s[k] * torch.outer(u[:, k], vh[k])
        slope = (loss(weight - step * component) - loss(weight + step * component)) / (2 * step)
        assert float(change) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_projection_drop_change_is_the_slope_of_shrinking_a_projection(shape):
    weight, loss = layer(*shape)
    u = random_orthonormal(shape[0], 4, 0)
    changes = projection_drop_change(u, weight, gradient_of(weight, loss))
    step = 1e-5
    for k, change in enumerate(changes):
        part = torch.outer(u[:, k], u[:, k]) @ weight
        slope = (loss(weight - step * part) - loss(weight + step * part)) / (2 * step)
        assert float(change) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_both_forms_agree_on_singular_vectors():
    weight, loss = layer()
    u, s, vh = svd(weight)
    gradient = gradient_of(weight, loss)
    np.testing.assert_allclose(
        projection_drop_change(u, weight, gradient), singular_drop_change(u, s, vh.T, gradient), rtol=1e-9
    )
