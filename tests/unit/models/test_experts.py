from copy import deepcopy

import pytest
import torch

from lowrank_kit.models.experts import list_experts, listed_experts, pack, tokens_of
from lowrank_kit.models.layout import layout_of

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "llama4_text")
IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model, request):
    """Biases that are no zeros, and experts that are no small change."""
    found, draw = tiny_model(request.param, initializer_range=0.2), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "experts" in name or "bias" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return found


everywhere = pytest.mark.parametrize("model", FAMILIES, indirect=True)


@everywhere
@torch.no_grad()
def test_a_model_with_listed_experts_computes_what_it_did(model):
    expected = model(IDS).logits
    before, parameters = layout_of(model), sum(p.numel() for p in model.parameters())
    list_experts(model)
    after = layout_of(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [(r.name, r.in_features, r.out_features, r.has_bias) for r in before.linears] == [
        (r.name, r.in_features, r.out_features, r.has_bias) for r in after.linears
    ]
    assert {ref.packed for ref in after.linears} == {False}
    assert {ref.kind for ref in before.linears if ref.packed} == {"expert"}


@everywhere
def test_packed_again_the_weights_are_the_familys_own_bit_for_bit(model):
    original = deepcopy(model.state_dict())
    list_experts(model)
    weights = model.state_dict()
    pack(weights, model, ())
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in original.items())


@everywhere
@torch.no_grad()
def test_an_expert_reads_the_tokens_that_the_router_sent_to_it(model):
    list_experts(model)
    chosen, read = [], {}

    def from_router(_module, _inputs, output):
        # Scores of all experts, zero where not chosen; or the numbers of the chosen ones.
        last = output[0] if output[0].shape[-1] == 4 and output[1].shape[-1] == 4 else output[-1]
        chosen.append(last)

    for name, module in model.named_modules():
        if name.endswith((".mlp.gate", ".router")):
            module.register_forward_hook(from_router)
    refs = [ref for ref in layout_of(model).linears if ref.expert is not None]
    for ref in refs:
        linear = model.get_submodule(ref.name)
        linear.register_forward_pre_hook(lambda _, args, name=ref.name: read.__setitem__(name, args[0]))
    model(IDS)
    blocks = [int(name.split(".")[2]) for name in listed_experts(model)]
    assert len(chosen) == len(blocks)
    for ref in refs:
        scores = chosen[blocks.index(ref.block)]
        sent = scores[:, ref.expert] > 0 if scores.is_floating_point() else (scores == ref.expert).any(-1)
        assert sorted(tokens_of(model, ref).tolist()) == torch.where(sent)[0].tolist(), ref.name
        if len(tokens_of(model, ref)):
            assert len(read[ref.name]) == len(tokens_of(model, ref))
