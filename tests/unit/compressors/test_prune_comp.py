from copy import deepcopy

import pytest
import torch

from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.prune_comp import PruneComp
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.architectures import registered
from lowrank_kit.models.layout import layout_of

REFUSED = ("gemma2", "gemma3", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3")
MERGED = sorted(set(registered()) - {*REFUSED, "bert", "roberta", "t5"})
IDS = torch.arange(3, 27).reshape(2, 12)


def method(**settings):
    return PruneComp(**{"name": "prune_comp", "ratio": 0.1, **settings})


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", MERGED)
def test_the_merged_scale_is_the_one_that_multiplies_the_stream(family, tiny_model, samples):
    """In the place of the removed block the stream is multiplied; embedding and head may be one."""
    model = tiny_model(family, tie_word_embeddings=True)
    for module in model.modules():
        for name in {"eps", "variance_epsilon"} & set(vars(module)):
            # Norms see the scale through this alone.
            setattr(module, name, 1e-30)
    small = deepcopy(model)
    layout = layout_of(small)
    compression = Compression(method(), Context(small, layout, samples))
    plan = compression.plan()
    scales = {name: value for name, value in plan.scores.items() if name.startswith("scale")}
    compression.apply(plan)
    for gone in set(range(len(layout.blocks))) - set(plan.kept_blocks):
        scale = scales[f"scale {gone}"]

        def scaled(_module, arguments, output, scale=scale):
            return (arguments[0] * scale, *output[1:]) if isinstance(output, tuple) else arguments[0] * scale

        model.get_submodule(layout.blocks[gone]).register_forward_hook(scaled)
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_families_with_norms_behind_what_blocks_write_are_refused_by_their_shapes(family, tiny_model):
    with pytest.raises(ConfigError, match=r"puts norms behind that|read keys and values"):
        method().check(layout_of(tiny_model(family)))


def test_a_block_that_only_magnifies_is_made_up_for(tiny_model, samples):
    model = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    context = Context(model, layout_of(model), samples)
    model.model.layers[1].register_forward_hook(lambda _m, _x, y: y * 1.5)
    expected = logits(model)
    compression = Compression(method(), context)
    plan = compression.plan()
    assert plan.kept_blocks == (0, 2, 3)
    assert plan.scores["scale 1"] == pytest.approx(1.5, rel=1e-6)
    small = compression.apply(plan)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-3)


def test_rounds_are_found_in_the_cache_by_every_ratio(tiny_model, samples, tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=6)
    context = Context(model, layout_of(model), samples, cache=tmp_path)
    three = method(ratio=0.5).calibrate(context)
    monkeypatch.setattr(PruneComp, "_measured", None)
    two = method(ratio=0.3).calibrate(context)
    assert list(two.scales.items()) == list(three.scales.items())[:2]


def test_all_at_once_takes_the_blocks_of_least_influence_with_their_own_scales(tiny_model, samples):
    model = tiny_model("llama", num_hidden_layers=6)
    found = method(ratio=0.5, iterative=False).calibrate(Context(model, layout_of(model), samples))
    ascending = sorted(range(6), key=lambda block: found.influence[block])
    assert list(found.scales) == ascending[:3]


def test_a_channel_that_is_zero_has_no_magnitude_to_compare(tiny_model, samples):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0
    with pytest.raises(LowRankKitError, match=r"around model.layers.0 .* or one of their channels is zero"):
        method().calibrate(Context(model, layout_of(model), samples))
