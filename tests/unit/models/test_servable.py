import copy

import pytest
import torch

from lowrank_kit.models.factored import factored_linears, ranks_of, share_down, shared_downs
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.portable import PivotLinear
from lowrank_kit.models.servable import make_servable
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture
def factored(tiny_model):
    """Biases, both storages, pivots that are shared (so that not all of them are rows), a shared factor."""
    model = tiny_model("qwen2", dtype="float64")
    draw = torch.Generator().manual_seed(0)
    refs = {ref.name: ref for ref in layout_of(model).linears}
    stacks = [[f"model.layers.0.self_attn.{role}_proj" for role in "kv"]]
    stacks += [[name] for name in refs if name not in stacks[0]]
    for number, names in enumerate(stacks):
        rows, columns = sum(refs[name].out_features for name in names), refs[names[0]].in_features
        up, down = (torch.randn(*s, generator=draw, dtype=torch.float64) / 5 for s in ((rows, 5), (5, columns)))
        (Pivot() if number % 2 == 0 else Factors()).put(model, names, LowRankFactors(up, down))
    share_down(model, "model.layers.2.mlp.gate_proj", "model.layers.1.mlp.gate_proj")
    with torch.no_grad():
        for _, layer in factored_linears(model):
            if (bias := layer.dense_bias()) is not None:
                bias.copy_(torch.randn(bias.shape, generator=draw))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_model_computes_what_it_did_with_its_own_factors(factored, multiple):
    assert len(shared_downs(factored)) == 2
    servable = copy.deepcopy(factored)
    assert make_servable(servable, multiple) == []
    assert not shared_downs(servable)
    assert set(ranks_of(servable).values()) == {5 if multiple == 1 else 8}
    torch.testing.assert_close(servable(IDS).logits, factored(IDS).logits, rtol=0, atol=1e-13)
    old = dict(factored_linears(factored))
    for name, layer in factored_linears(servable):
        assert isinstance(layer, PivotLinear) == isinstance(old[name], PivotLinear)
        torch.testing.assert_close(layer.dense_weight(), old[name].dense_weight(), rtol=0, atol=1e-15)


def test_a_rank_whose_multiple_costs_as_much_as_the_matrix_stays(factored):
    before = ranks_of(factored)
    kept = make_servable(factored, 16)
    after = ranks_of(factored)
    assert kept
    assert {name for name in before if after[name] == 5} == set(kept)
    assert {rank for name, rank in after.items() if name not in kept} == {16}
    for name, layer in factored_linears(factored):
        if name not in kept:
            assert sum(p.numel() for p in layer.parameters()) < layer.in_features * (layer.out_features + 1) + 16
