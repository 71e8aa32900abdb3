from copy import deepcopy

import pytest
import torch

from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.replace_me import ReplaceMe
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import registered
from lowrank_kit.models.layout import layout_of

MERGED = ("llama", "qwen2", "gemma", "cohere", "glm", "phi3", "gpt2", "opt")
REFUSED = {
    **dict.fromkeys(("gemma2", "gemma3", "glm4", "olmo2", "olmo3"), "puts norms behind"),
    "granite": "scales that",
    **dict.fromkeys(("mixtral", "gpt_oss", "llama4_text"), "of experts that a router mixes"),
    "gemma4_text": "read keys and values",
}


def method(**settings):
    return ReplaceMe(**{"name": "replace_me", "ratio": 0.3, **settings})


def compressed(model, samples, chosen):
    copy = deepcopy(model)
    compression = Compression(chosen, Context(copy, layout_of(copy), samples))
    plan = compression.plan()
    return plan, compression.apply(plan)


@torch.no_grad()
def given(model, path, ids):
    """What a module gives, in float64, a row a token."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _x, output: found.append(output))
    model(ids)
    handle.remove()
    [output] = found
    states = output[0] if isinstance(output, tuple) else output
    return states.reshape(-1, states.shape[-1]).double()


@pytest.mark.parametrize("family", MERGED)
def test_the_stream_before_the_run_becomes_the_best_guess_of_that_behind_it(family, tiny_model, samples):
    """By lstsq in float64 on the original's own states; biases, transposed weights and parallel MLPs are families'."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    layout = layout_of(model)
    plan, small = compressed(model, samples, method())
    [first] = set(range(3)) - set(plan.kept_blocks)
    [down] = (ref for ref in layout.linears if (ref.block, ref.role) == (first - 1, "down"))
    ids = torch.stack([sample["input_ids"] for sample in samples.sequences])
    before, behind = layout.blocks[first - 1 : first + 1]
    h, m, goal = given(model, before, ids), given(model, down.name, ids), given(model, behind, ids)
    expected = h - m + m @ torch.linalg.lstsq(m, goal - (h - m)).solution
    torch.testing.assert_close(given(small, before, ids), expected, rtol=0, atol=1e-4)
    assert (expected - goal).norm() < 0.99 * (h - goal).norm()


def test_what_no_token_reaches_of_the_mlp_outputs_is_left_as_it_is(tiny_model, samples):
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:5] = block.mlp.down_proj.weight[5]
    _, small = compressed(model, samples, method())
    largest = model.model.layers[0].mlp.down_proj.weight.abs().max()
    assert small.model.layers[0].mlp.down_proj.weight.abs().max() < 10 * largest


def test_a_run_that_does_nothing_leaves_the_model_as_it_is(tiny_model, samples):
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for block in model.model.layers[2:4]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    plan, small = compressed(model, samples, method())
    assert plan.kept_blocks == (0, 1, 4, 5)
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "message"), REFUSED.items())
def test_families_whose_mlp_takes_no_map_are_refused_by_their_shapes(family, message, tiny_model):
    with pytest.raises(ConfigError, match=message):
        method().check(layout_of(tiny_model(family)))


def test_every_causal_family_is_merged_or_refused():
    same = {"mistral": "llama", "qwen3": "llama", "smollm3": "llama", "cohere2": "cohere", "gemma3_text": "gemma2"}
    mixtures = {"olmoe", "qwen3_moe", "qwen2_moe"}
    assert set(registered()) - {"bert", "roberta", "t5"} == {*MERGED, *REFUSED, *same, *mixtures}


def test_opt_with_norms_behind_its_sums_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"method=replace_me changes .* this opt puts norms behind that: .*=shortgpt"):
        method().check(layout_of(tiny_model("opt", do_layer_norm_before=False)))


def test_too_few_tokens_for_a_map_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="31 calibration tokens cannot determine a map of 32 directions"):
        method().check_tokens(layout_of(tiny_model("llama")), 31)


def test_another_process_finds_the_map_in_the_cache(tiny_model, samples, tmp_path, monkeypatch):
    model = tiny_model("llama")
    context = Context(model, layout_of(model), samples, cache=tmp_path)
    found = method().calibrate(context)
    monkeypatch.setattr(ReplaceMe, "_fitted", None)
    again = method().calibrate(context)
    assert torch.equal(again.transform, found.transform)
    assert again.distances == found.distances
