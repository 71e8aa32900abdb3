import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.factored import ranks_of, replace_linear, share_down, shared_downs
from lowrank_kit.models.portable import LowRankLinear
from lowrank_kit.spectral.factors import LowRankFactors


def _factors(out_features: int, in_features: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(out_features, rank, generator=draw, dtype=torch.float64),
        torch.randn(rank, in_features, generator=draw, dtype=torch.float64),
    )


def _holder(**linears: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleDict(linears)})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_output_is_that_of_the_product_with_the_original_bias(kind, bias):
    torch.manual_seed(0)
    dense = nn.Linear(7, 5, bias=bias, dtype=torch.float64) if kind == "linear" else Conv1D(5, 7).double()
    if kind == "conv1d":
        nn.init.normal_(dense.bias)
    model = _holder(fc=dense)
    up, down = _factors(5, 7, 3)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    layer = replace_linear(model, "block.fc", LowRankFactors(up, down))
    expected = x.numpy() @ (up.numpy() @ down.numpy()).T
    if dense.bias is not None:
        expected = expected + dense.bias.detach().numpy()
    np.testing.assert_allclose(model.get_submodule("block.fc")(x).detach().numpy(), expected, rtol=1e-12)
    assert (layer.in_features, layer.out_features, layer.rank) == (7, 5, 3)
    assert layer.up.bias is None or layer.up.bias is not dense.bias


def test_dtype_device_and_mode_are_those_of_the_dense_layer():
    model = _holder(fc=nn.Linear(7, 5, dtype=torch.bfloat16), ghost=nn.Linear(7, 5, device="meta")).eval()
    for name in ("block.fc", "block.ghost"):
        layer = replace_linear(model, name, LowRankFactors(*_factors(5, 7, 3)))
        assert not layer.training
        assert not layer.up.training
    assert {p.dtype for p in model.get_submodule("block.fc").parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.get_submodule("block.ghost").parameters()} == {"meta"}


def test_dense_weight_is_exact_for_the_stored_factors():
    layer = LowRankLinear.from_factors(*_factors(6, 9, 4), dtype=torch.bfloat16)
    stored = layer.up.weight.detach().double().numpy() @ layer.down.weight.detach().double().numpy()
    assert layer.dense_weight().dtype is torch.float64
    np.testing.assert_allclose(layer.dense_weight().numpy(), stored, rtol=1e-14)
    assert not hasattr(layer, "weight")


def test_a_shared_factor_is_one_parameter_also_after_a_copy():
    model = _holder(a=nn.Linear(7, 5), b=nn.Linear(7, 4), c=nn.Linear(7, 5), d=nn.Linear(3, 3))
    for name, out in (("a", 5), ("b", 4), ("c", 5)):
        replace_linear(model, f"block.{name}", LowRankFactors(*_factors(out, 7, 3)))
    share_down(model, "block.b", "block.a")
    share_down(model, "block.c", "block.a")
    for one in (model, copy.deepcopy(model)):
        assert shared_downs(one) == {"block.b": "block.a", "block.c": "block.a"}
        assert ranks_of(one) == {"block.a": 3, "block.b": 3, "block.c": 3}
        factors = 3 * 7 + 3 * (5 + 4 + 5) + (5 + 4 + 5)
        assert sum(p.numel() for p in one.parameters()) == factors + 3 * 3 + 3


def test_factors_that_do_not_fit_and_layers_that_are_not_linear_are_refused():
    model = _holder(a=nn.Linear(7, 5), b=nn.Linear(7, 5), norm=nn.LayerNorm(7))
    with pytest.raises(ValueError, match=r"do not fit 'block\.a' \(5, 7\)"):
        replace_linear(model, "block.a", LowRankFactors(*_factors(7, 5, 3)))
    with pytest.raises(LowRankKitError, match=r"'block\.norm' is a torch.*LayerNorm"):
        replace_linear(model, "block.norm", LowRankFactors(*_factors(7, 7, 3)))
    replace_linear(model, "block.a", LowRankFactors(*_factors(5, 7, 3)))
    with pytest.raises(ValueError, match="must both be factored"):
        share_down(model, "block.a", "block.b")
    replace_linear(model, "block.b", LowRankFactors(*_factors(5, 7, 2)))
    with pytest.raises(ValueError, match="cannot share"):
        share_down(model, "block.b", "block.a")
