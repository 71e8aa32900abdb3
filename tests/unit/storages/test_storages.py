"""Every storage computes the product that it is given, from as many parameters as it says."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.models.factored import pivot_rows_of, ranks_of, shared_downs
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.storage import Storage
from lowrank_kit.storages.two_factors import Factors

STORAGES = Storage.known
SHAPES = [(9, 14), (14, 9), (8, 8), (2, 9)]


def factors(out, width, rank):
    draw = torch.Generator().manual_seed(out * width + rank)
    up, down = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((out, rank), (rank, width)))
    return LowRankFactors(up, down)


def holder(kind, out, width, names="a", bias=True):
    torch.manual_seed(0)
    linears = {n: nn.Linear(width, out, bias) if kind == "linear" else Conv1D(out, width) for n in names}
    for linear in linears.values():
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return nn.ModuleDict({"block": nn.ModuleDict(linears)}).double()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_outputs_are_those_of_the_product_with_the_bias(storage, shape, kind):
    product, model = factors(*shape, rank=min(shape) - 1), holder(kind, *shape)
    bias = model.block.a.bias.detach().numpy().copy()
    STORAGES[storage]().put(model, ["block.a"], product)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    expected = x.numpy() @ (product.up.numpy() @ product.down.numpy()).T + bias
    np.testing.assert_allclose(model.block.a(x).detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(model.block.a.dense_weight().numpy(), product.dense().numpy(), atol=1e-12)
    np.testing.assert_array_equal(model.block.a.dense_bias().detach().numpy(), bias)
    assert ranks_of(model) == {"block.a": min(shape) - 1}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_rank_costs_the_parameters_that_it_has(storage, shape):
    found = STORAGES[storage]()
    costs = []
    for rank in range(1, min(shape)):
        model = holder("linear", *shape, bias=False)
        found.put(model, ["block.a"], factors(*shape, rank))
        costs.append(sum(p.numel() for p in model.parameters()))
        assert costs[-1] == found.cost(*shape, rank)
    assert costs == sorted(set(costs))


def test_pivots_are_never_above_the_dense_matrix():
    assert all(Pivot().cost(*shape, rank) < shape[0] * shape[1] for shape in SHAPES for rank in range(1, min(shape)))
    assert all(Pivot().cost(*shape, min(shape)) == shape[0] * shape[1] for shape in SHAPES)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_stack_shares_one_down_also_after_a_copy(storage):
    product, model = factors(3 * 9, 14, 5), holder("linear", 9, 14, "abc", bias=False)
    names = [f"block.{name}" for name in "abc"]
    STORAGES[storage]().put(model, names, product)
    x = torch.randn(4, 14, dtype=torch.float64)
    for one in (model, copy.deepcopy(model)):
        assert shared_downs(one) == {"block.b": "block.a", "block.c": "block.a"}
        assert sum(p.numel() for p in one.parameters()) == STORAGES[storage]().cost(3 * 9, 14, 5)
        outputs = torch.cat([one.get_submodule(name)(x) for name in names], -1)
        torch.testing.assert_close(outputs, x @ product.dense().T)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_outline_is_what_the_weights_fit_into(storage):
    product, model = factors(9, 14, 5), holder("linear", 9, 14)
    outlined = copy.deepcopy(model).to("meta")
    STORAGES[storage]().put(model, ["block.a"], product)
    STORAGES[storage]().outline(outlined, "block.a", 5)
    assert {p.device.type for p in outlined.parameters()} == {"meta"}
    outlined.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(4, 14, dtype=torch.float64)
    assert outlined.block.a(x).equal(model.block.a(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_all_parameters_learn(storage):
    """A step along the gradient of the output error against a second product lowers it, and moves every one."""
    model, x = holder("linear", 9, 14), torch.randn(64, 14, dtype=torch.float64)
    STORAGES[storage]().put(model, ["block.a"], factors(9, 14, 5))
    target = x @ factors(9, 14, 5).dense().T + torch.randn(64, 9, dtype=torch.float64)

    def error():
        return (model.block.a(x) - target).square().mean()

    before = error()
    before.backward()
    assert len(list(model.parameters())) == 3
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad.abs().sum() > 0
            parameter -= 1e-4 * parameter.grad
    assert error() < before


def test_half_precision_keeps_the_index():
    model = holder("linear", 9, 14)
    Pivot().put(model, ["block.a"], factors(9, 14, 5))
    assert model.bfloat16().block.a.index.dtype is torch.int32
    assert pivot_rows_of(model) == {"block.a": 5}
    assert model.block.a(torch.randn(3, 14, dtype=torch.bfloat16)).dtype is torch.bfloat16
    plain = holder("linear", 9, 14)
    Factors().put(plain, ["block.a"], factors(9, 14, 5))
    assert pivot_rows_of(plain) == {}


# torch's own quantiser is deprecated in favour of torchao, and is here without it.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantiser_of_plain_linears_takes_its_halves(storage):
    model, x = holder("linear", 96, 64).float(), torch.randn(256, 64)
    STORAGES[storage]().put(model, ["block.a"], factors(96, 64, 24))
    expected = model.block.a(x)
    found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).block.a
    assert not isinstance(found.down, nn.Linear)
    assert not isinstance(found.up, nn.Linear)
    assert (found(x) - expected).norm() < 0.1 * expected.norm()
