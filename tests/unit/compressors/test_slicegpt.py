from dataclasses import replace

import pytest
import torch

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.slicegpt import SliceGPT, slice_model
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.architectures import all_with
from lowrank_kit.models.layout import layout_of

SLICEABLE = tuple(all_with(lambda architecture: architecture.plain_residual))

IDS = torch.randint(3, 64, (6, 40), generator=torch.Generator().manual_seed(0))
SAMPLES = CalibrationSamples(tuple({"input_ids": row} for row in IDS), batch_size=4)


def method(**settings):
    return SliceGPT(**({"name": "slicegpt", "multiple": 1, "ratio": 0.3} | settings))


def in_blocks(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.8])
@pytest.mark.parametrize("family", SLICEABLE)
def test_the_widest_model_within_the_budget_is_made(tiny_model, family, ratio):
    model = tiny_model(family)
    compression = Compression(method(ratio=ratio), Context(model, layout_of(model), SAMPLES))
    before, budget = in_blocks(model), compression.method.budget(compression.context.layout)
    plan = compression.plan()
    sliced = compression.apply(plan)
    assert (plan.parameters_before, plan.parameters_after) == (before, in_blocks(sliced))
    wider = sliced.config.hidden_size + 1
    other_sides = sum(sum(ref_sides) - 32 for ref_sides in sides_of(tiny_model(family)))
    assert plan.parameters_after <= budget < wider * other_sides + 2 * 3 * wider**2
    assert plan.ranks == {ref.name: ref.full_rank for ref in layout_of(sliced).linears}


def sides_of(model):
    return [(ref.out_features, ref.in_features) for ref in layout_of(model).linears]


def test_the_width_is_a_multiple(tiny_model):
    assert method(multiple=8, ratio=0.4).width(layout_of(tiny_model("llama"))) == 16


@torch.no_grad()
def test_a_residual_stream_of_few_dimensions_loses_nothing(tiny_model):
    """Embeddings and outputs in one 12-dimensional subspace: 12 directions hold everything, whatever the basis."""
    model = tiny_model("llama")
    space = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q[:, :12]
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ space @ space.T)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(space @ space.T @ linear.weight)
    expected = model(IDS).logits
    slice_model(model, SAMPLES, 12)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_principal_directions_lose_less_than_the_others(tiny_model):
    """Of models whose embeddings are nearly 16-dimensional, slicing keeps those dimensions."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight[:, 16:] *= 1e-3
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[16:] *= 1e-3
    expected = model(IDS).logits
    slice_model(model, SAMPLES, 16)
    assert (model(IDS).logits - expected).norm() < 5e-3 * expected.norm()


def test_batch_size_and_planning_change_nothing(tiny_model):
    models = [tiny_model("qwen3") for _ in range(2)]
    compressions = [
        Compression(method(), Context(m, layout_of(m), replace(SAMPLES, batch_size=size)))
        for m, size in zip(models, (2, 6), strict=True)
    ]
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    plans = [c.plan() for c in compressions]
    assert plans[0] == plans[1]
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters())
    with torch.no_grad():
        one, other = (c.apply(plan)(IDS).logits for c, plan in zip(compressions, plans, strict=True))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "opt", "phi3", "gpt2"])
def test_another_family_is_refused(tiny_model, family):
    with pytest.raises(ConfigError, match=rf"slices .*llama, .* is a {family}"):
        method().check(layout_of(tiny_model(family)))


def test_the_nearest_feasible_ratio_is_feasible(tiny_model):
    layout = layout_of(tiny_model("llama"))
    with pytest.raises(ConfigError, match="hidden size of 8") as error:
        method(ratio=0.9, multiple=8).check(layout)
    nearest = float(str(error.value).split("feasible ratio is ")[1].split(",")[0])
    assert method(ratio=nearest, multiple=8).width(layout) == 8
    with pytest.raises(ConfigError, match="multiple=64 exceeds the hidden size 32"):
        method(multiple=64).check(layout)


def test_too_few_tokens_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="10 calibration tokens cannot determine"):
        method().check_tokens(layout_of(tiny_model("llama")), 10)


def test_hidden_states_that_are_not_finite_name_their_place(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(LowRankKitError, match="leaves block 1"):
        slice_model(model, SAMPLES, 16)
