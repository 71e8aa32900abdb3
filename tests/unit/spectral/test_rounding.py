"""Whole numbers of few bits: torchao's codes, the bytes they take, and what rounding costs in the metric."""

import numpy as np
import pytest
import torch

from lowrank_kit.models.portable import RoundedLinear
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.rounding import Rounding, rounding_losses
from lowrank_kit.spectral.truncate import damped_root, input_projection, output_projection

ROUNDINGS = [Rounding(8), Rounding(4, 32), Rounding(4, 20), Rounding(8, 7)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_weight_is_torchaos(bits, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    weight = normal(48, 96).to(dtype)
    model = torch.nn.Sequential(torch.nn.Linear(96, 48, bias=False, dtype=dtype))
    model[0].weight.data.copy_(weight)
    four = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig() if bits == 8 else four)
    expected = model[0].weight.dequantize().double()
    codes, scale = Rounding(bits, 32 if bits == 4 else 0).codes(weight, dtype)
    steps = scale.double().repeat_interleave(96 // scale.shape[1], 1)
    difference = ((codes * steps - expected) / steps).abs()
    # The largest of a group lies in the middle of two codes; bfloat16 keeps 8 bits of a scale, torchao's of int8 all.
    assert difference.max() < 1.03
    same = difference < (1e-4 if dtype == torch.float32 else 0.5)
    assert same.double().mean() > (1 - 1.5 / 32 if bits == 4 else 0.98)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(9, 64), (5, 7), (3, 33)])
def test_a_layer_holds_what_the_codes_stand_for_in_so_many_bytes(shape, rounding):
    weight, bias = normal(*shape).float(), normal(shape[0]).float()
    # A group of zeros, and the smallest code.
    weight[0, : min(rounding.group or 7, shape[1])] = 0
    codes, scale = rounding.codes(weight, torch.float32)
    codes[-1, -1] = -(2 ** (rounding.bits - 1))
    layer = RoundedLinear.from_codes(codes, scale, rounding.bits, rounding.group, bias)
    steps = scale.numpy().repeat(rounding.group or shape[1], 1)[:, : shape[1]]
    np.testing.assert_allclose(layer.weight.numpy(), codes.numpy() * steps, rtol=1e-6)
    x = normal(4, shape[1]).float()
    torch.testing.assert_close(layer(x), x @ layer.weight.T + bias)
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert held == rounding.size(*shape, itemsize=4)


@pytest.mark.parametrize("rounding", [Rounding(8), Rounding(4, 32)])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_what_rounding_costs_is_the_quadratic_form_of_its_error(shape, rounding):
    """Against tr(B E C E^T) itself, E what truncation and rounding together take, at several ranks."""
    out, width = shape
    weight = normal(*shape)
    x = normal(4000, width, seed=1) * torch.linspace(0.2, 3, width, dtype=torch.float64) @ normal(width, width, seed=2)
    g = normal(4000, out, seed=3) * torch.linspace(0.1, 2, out, dtype=torch.float64)
    c, b = x.T @ x / len(x), g.T @ g / len(g)
    if out <= width:
        projection = output_projection(weight, Moments(c, x.mean(0), 1), damped_root(b, 1e-12))
    else:
        projection = input_projection(c, weight.T @ b @ weight)
    found = rounding_losses(projection, weight, (b.diagonal(), c.diagonal()), rounding, torch.float64)
    tails = projection.values.flip(0).cumsum(0).flip(0)

    def measured(approximation):
        error = weight - approximation
        return float((b @ error @ c @ error.T).trace())

    for rank in (8, 32, 47):
        up, down = projection.factors(weight, rank).with_unit_columns()
        product = rounding.rounded(up, torch.float64) @ rounding.rounded(down, torch.float64)
        lost = measured(product) - float(tails[rank])
        assert lost == pytest.approx(float(found[:rank].sum()), rel=0.25)
    assert measured(rounding.rounded(weight, torch.float64)) == pytest.approx(float(found[-1]), rel=0.15)


def test_columns_of_one_length_lose_less_than_balanced_factors():
    weight, c = normal(48, 96), torch.linspace(0.2, 3, 96, dtype=torch.float64).diag()
    factors = output_projection(weight @ c, Moments(c @ c, c[0], 1)).factors(weight, 24)

    def lost(product):
        up, down = (Rounding(8).rounded(part, torch.float64) for part in product)
        return (up @ down - factors.dense()).norm()

    assert torch.allclose(factors.with_unit_columns().dense(), factors.dense())
    assert lost(factors.with_unit_columns()) < lost(factors)
