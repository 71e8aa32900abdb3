import pytest
import torch
import warm
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.blocks import block_sizes, fewest_blocks, ranks_with
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.depth import collapse, drop_blocks, take_matrices
from lowrank_kit.models.factored import ranks_of, replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("gemma3_text", "phi3", "opt", "gpt2", "olmo3", "cohere2"),
)
IDS = torch.arange(3, 19).reshape(2, 8)
LAYERS = 5
KEPT = (0, 2, 3)
# Layers differ in kind, so that a list of kinds that is not cut, or cut elsewhere, is seen.
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"layer_types": KINDS, "sliding_window": 4, "use_sliding_window": True}
SETTINGS = {"gpt2": {"n_layer": LAYERS}, "opt": {}, "llama": {}, "phi3": {}, "mistral": {}}

FRESH = """
import torch, transformers
from transformers import AutoModelForCausalLM
assert "lowrank_kit" not in __import__("sys").modules
for family, (ids, expected, stock) in torch.load("expected.pt").items():
    model, info = AutoModelForCausalLM.from_pretrained(family, output_loading_info=True, trust_remote_code=not stock)
    assert not any(info.values()), (family, info)
    assert (type(model).__module__.startswith("transformers.models")) == stock, family
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected), family
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain), family
"""


def deep_model(tiny_model, family, seed=0):
    if family == "gemma3":
        text = tiny_model(family).config.text_config.to_dict() | {"num_hidden_layers": LAYERS, **WINDOWED}
        return tiny_model(family, seed=seed, text_config=Gemma3TextConfig(**text))
    settings = SETTINGS.get(family, WINDOWED)
    return tiny_model(family, seed=seed, **({"num_hidden_layers": LAYERS} | settings))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shallow_by_hand(model, family, tiny_model):
    """A model made with fewer layers, every weight copied: blocks by their number in the parameter's name."""
    text = model.config.get_text_config()
    fewer = {"n_layer" if family == "gpt2" else "num_hidden_layers": len(KEPT)}
    if getattr(text, "layer_types", None):
        fewer |= {"layer_types": [text.layer_types[i] for i in KEPT], "sliding_window": 4, "use_sliding_window": True}
    if family == "gemma3":
        fewer = {"text_config": Gemma3TextConfig(**(text.to_dict() | fewer))}
    shallow = tiny_model(family, seed=9, **fewer)
    weights = model.state_dict()
    stack = layout_of(model).blocks[0].rpartition(".")[0]
    with torch.no_grad():
        for name, parameter in shallow.named_parameters():
            if name.startswith(f"{stack}."):
                number, rest = name.removeprefix(f"{stack}.").split(".", 1)
                name = f"{stack}.{KEPT[int(number)]}.{rest}"
            parameter.copy_(weights[name])
    return shallow


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_the_model_built_with_fewer_layers(family, tiny_model):
    model = deep_model(tiny_model, family)
    before, expected = logits(model), logits(shallow_by_hand(model, family, tiny_model))
    drop_blocks(model, layout_of(model), KEPT)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, before)
    layout = layout_of(model)
    assert len(layout.blocks) == model.config.get_text_config().num_hidden_layers == 3
    assert max(ref.block for ref in layout.linears) == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    """Every family with blocks dropped, and once more with one linear factored."""
    folder, expected = tmp_path_factory.mktemp("dropped"), {}
    for family in FAMILIES:
        for mixed in (False, True) if family in ("llama", "gpt2", "gemma2") else (False,):
            model = deep_model(tiny_model, family)
            drop_blocks(model, layout_of(model), KEPT)
            if mixed:
                ref = layout_of(model).linears[-1]
                weight = weight_of(model.get_submodule(ref.name))
                replace_linear(
                    model, ref.name, LowRankFactors(torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1]))
                )
                assert list(ranks_of(model)) == [ref.name]
                assert ".2." in ref.name
            name = family + "-mixed" * mixed
            save_compressed(model, folder / name)
            expected[name] = (IDS, logits(model), not mixed)
    torch.save(expected, folder / "expected.pt")
    return folder


def test_plain_transformers_loads_it_in_another_process_and_generates_with_its_cache(saved):
    warm.run(["-c", FRESH], cwd=saved, check=True)


def test_the_saved_configuration_has_fewer_layers_of_the_kept_kinds(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "gemma2")
    assert model.config.layer_types == [KINDS[i] for i in KEPT]
    assert AutoModelForCausalLM.from_pretrained(saved / "gpt2").config.n_layer == 3


def test_qwens_boundary_between_full_and_windowed_blocks_moves(tiny_model):
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 3
    model = tiny_model("qwen2", num_hidden_layers=LAYERS, layer_types=kinds, max_window_layers=2)
    drop_blocks(model, layout_of(model), (1, 3, 4))
    assert model.config.max_window_layers == 1


def test_attention_is_numbered_anew(tiny_model):
    model = deep_model(tiny_model, "llama")
    drop_blocks(model, layout_of(model), (1, 4))
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (0, 5), (-1, 0)])
def test_indices_that_cannot_be_are_refused(kept, tiny_model):
    model = deep_model(tiny_model, "llama")
    with pytest.raises(ValueError, match="5 blocks"):
        drop_blocks(model, layout_of(model), kept)


def test_an_encoder_decoder_model_is_refused(tiny_model):
    model = tiny_model("t5", "seq2seq")
    with pytest.raises(LowRankKitError, match="encoder and a decoder"):
        drop_blocks(model, layout_of(model), (0, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_collapse_adds_up_the_differences_of_every_parameter(family, tiny_model):
    model = deep_model(tiny_model, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    base, *followers = (model.get_submodule(path) for path in layout_of(model).blocks[1:4])
    first, second, third = ({n: p.clone() for n, p in b.named_parameters()} for b in (base, *followers))
    collapse(base, followers)
    names = [name for name, parameter in base.named_parameters() if parameter.ndim == 1]
    assert names
    for name, parameter in base.named_parameters():
        by_hand = first[name] + (second[name] - first[name]) + (third[name] - first[name])
        torch.testing.assert_close(parameter, by_hand)
    for follower, untouched in zip(followers, (second, third), strict=True):
        assert all(torch.equal(p, untouched[n]) for n, p in follower.named_parameters())


def test_collapsing_one_block_into_another_gives_the_other_and_equal_ones_stay(tiny_model):
    model = deep_model(tiny_model, "llama")
    blocks = model.model.layers
    blocks[2].load_state_dict(blocks[1].state_dict())
    expected = {n: p.clone() for n, p in blocks[1].named_parameters()}
    collapse(blocks[1], [blocks[2]])
    assert all(torch.equal(p, expected[n]) for n, p in blocks[1].named_parameters())
    collapse(blocks[1], [blocks[3]])
    assert all(torch.equal(p, dict(blocks[3].named_parameters())[n]) for n, p in blocks[1].named_parameters())


def test_matrices_are_taken_over_and_vectors_stay(tiny_model):
    model = deep_model(tiny_model, "opt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    base, follower = (model.get_submodule(path) for path in layout_of(model).blocks[1:3])
    own, theirs = ({n: p.clone() for n, p in block.named_parameters()} for block in (base, follower))
    take_matrices(base, follower)
    assert all(torch.equal(p, (own if p.ndim == 1 else theirs)[n]) for n, p in base.named_parameters())


def test_block_counts_and_ranks(tiny_model):
    layout = layout_of(deep_model(tiny_model, "llama"))
    sizes = block_sizes(layout)
    assert len(set(sizes)) == 1
    total = sum(sizes)
    assert [fewest_blocks(layout, budget) for budget in (total - 1, total - sizes[0], sizes[0])] == [1, 1, 4]
    with pytest.raises(ConfigError, match=r"method\.ratio to 0\.8,"):
        fewest_blocks(layout, sizes[0] - 1)
    ranks = ranks_with(layout, (0, 3))
    assert {ref.block for ref in layout.linears if ranks[ref.name]} == {0, 3}
    assert all(ranks[ref.name] == ref.full_rank for ref in layout.linears if ref.block in (0, 3))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "llama4_text"])
def test_what_is_left_of_blocks_with_and_without_experts_is_read_back(family, tiny_model, tmp_path):
    """In these, which block has experts is a matter of its number."""
    model = tiny_model(family)
    drop_blocks(model, layout_of(model), (1, 2))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    kinds = [{ref.kind for ref in layout_of(loaded).linears if ref.block == block} for block in range(2)]
    assert [("expert" in found) for found in kinds] == [family != "qwen3_moe", family == "qwen3_moe"]
