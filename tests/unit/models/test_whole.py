"""A checkpoint is whole or refused, with every weight named; only a head that a task needs may be new."""

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.load import ModelSource, check_files, load_config, load_like, load_model, skeleton
from lowrank_kit.spectral.factors import LowRankFactors


@pytest.fixture
def changed(tiny_model, tmp_path):
    """A saved model whose weights were taken away, added or replaced."""

    def build(family, head, lacks=(), has=(), **config):
        tiny_model(family, head, **config).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        for name in lacks:
            del weights[name]
        weights |= {name: torch.full(shape, 0.1) for name, shape in dict(has).items()}
        save_file(weights, file, {"format": "pt"})
        return ModelSource(str(tmp_path))

    return build


BLOCK = "model.layers.1."


@pytest.mark.parametrize(
    ("family", "saved", "wanted", "lacks"),
    [
        ("llama", "causal", "causal", ["lm_head.weight"]),
        ("llama", "causal", "causal", ["model.norm.weight"]),
        ("llama", "causal", "causal", ["model.embed_tokens.weight"]),
        ("llama", "causal", "classification", ["model.embed_tokens.weight", "model.norm.weight"]),
        ("llama", "causal", "causal", [f"{BLOCK}input_layernorm.weight", f"{BLOCK}mlp.up_proj.weight"]),
        ("gpt2", "causal", "causal", ["transformer.h.0.attn.c_attn.bias", "transformer.wpe.weight"]),
        ("bert", "classification", "classification", ["classifier.bias"]),
        ("bert", "classification", "classification", ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]),
        ("bert", "base", "classification", ["embeddings.LayerNorm.weight"]),
        ("roberta", "classification", "classification", ["classifier.out_proj.weight", "classifier.out_proj.bias"]),
    ],
)
def test_every_weight_that_is_missing_is_named(changed, family, saved, wanted, lacks):
    source = changed(family, saved, lacks)
    with pytest.raises(LowRankKitError, match=f"lacks {len(lacks)} weight") as raised:
        load_model(source, wanted, num_labels=2 if wanted == "classification" else None)
    for name in lacks:
        inside = re.sub(r"^embeddings", "bert.embeddings", name)
        assert inside in str(raised.value)
    assert source.path in str(raised.value)


@pytest.mark.parametrize(
    ("family", "saved", "wanted", "has"),
    [
        ("llama", "causal", "causal", {f"{BLOCK}self_attn.q_proj.bias": (48,)}),
        ("llama", "causal", "causal", {"model.layers.3.mlp.up_proj.weight": (48, 32), "score.weight": (2, 32)}),
        ("llama", "causal", "classification", {"model.layers.7.mlp.up_proj.weight": (48, 32)}),
        ("bert", "base", "classification", {"encoder.layer.5.output.dense.bias": (32,), "extra.weight": (3,)}),
    ],
)
def test_every_weight_that_has_no_place_is_named(changed, family, saved, wanted, has):
    source = changed(family, saved, has=has)
    with pytest.raises(LowRankKitError, match=f"it has {len(has)} weight") as raised:
        load_model(source, wanted, num_labels=2 if wanted == "classification" else None)
    assert all(name in str(raised.value) for name in has)


def test_the_same_weights_of_several_blocks_are_named_together(changed):
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(3) for part in ("up", "down")]
    with pytest.raises(LowRankKitError, match=r"lacks 6 weights \(model\.layers\.\{0,1,2\}\.mlp\.down_proj\.weight, "):
        load_model(changed("llama", "causal", names), "causal")


def test_a_weight_of_another_shape_is_named_with_both(changed):
    source = changed("llama", "causal", has={"model.norm.weight": (31,)})
    with pytest.raises(LowRankKitError, match=r"model\.norm\.weight is \[31\] there, and \[32\] by its config"):
        load_model(source, "causal")
    with pytest.raises(LowRankKitError, match=r"is \[2, 32\] there, and \[3, 32\]"):
        load_model(changed("bert", "classification"), "classification", num_labels=3)


@pytest.mark.parametrize(
    ("family", "saved", "new", "left_out"),
    [
        ("llama", "causal", ("score",), ("lm_head",)),
        ("bert", "base", ("classifier",), ()),
        ("bert", "causal", ("bert.pooler", "classifier"), ("cls",)),
        ("roberta", "base", ("classifier",), ("pooler",)),
        ("bert", "classification", (), ()),
    ],
)
def test_a_new_head_and_one_that_is_left_out_are_said(changed, caplog, family, saved, new, left_out):
    source = changed(family, saved)
    with caplog.at_level(logging.INFO, "lowrank_kit"):
        loaded = load_model(source, "classification", num_labels=2)
    assert (loaded.new_modules, loaded.left_out) == (new, left_out)
    said = "\n".join(caplog.messages)
    assert all(name in said for name in (*new, *left_out))
    assert bool(said) == bool(new)


def test_tied_weights_are_whole_with_one_of_the_two(changed):
    source = changed("llama", "causal", tie_word_embeddings=True)
    assert load_model(source, "causal").new_modules == ()
    with pytest.raises(LowRankKitError, match=r"lm_head\.weight, transformer\.wte\.weight"):
        load_model(changed("gpt2", "causal", ["transformer.wte.weight"]), "causal")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_no_causal_language_model(tiny_model, tmp_path, family):
    tiny_model(family, "base").save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    for ask in (lambda: load_model(source, "causal"), lambda: skeleton(load_config(source), "causal")):
        with pytest.raises(LowRankKitError, match=f"{tmp_path}' is no causal language model: this {family} reads"):
            ask()


def test_a_decoder_that_sees_both_sides_is_no_causal_language_model(changed):
    with pytest.raises(LowRankKitError, match="is no causal language model"):
        load_model(changed("gemma3_text", "causal", use_bidirectional_attention=True), "causal")


def test_a_classifier_is_no_causal_language_model(changed):
    with pytest.raises(LowRankKitError, match=r"lacks 1 weight \(lm_head\.weight\); it has 1 weight \(score\.weight\)"):
        load_model(changed("llama", "classification"), "causal")


def test_what_was_trained_is_read_back_whole(changed, tiny_model):
    like = tiny_model("llama", "classification").to(torch.bfloat16)
    source = changed("llama", "classification")
    assert load_like(like, Path(source.path)).dtype == torch.bfloat16
    with pytest.raises(LowRankKitError, match=r"lacks 1 weight \(score\.weight\)"):
        load_like(like, Path(changed("llama", "classification", ["score.weight"]).path))


def torch_file(tiny_model, folder):
    """The same checkpoint as torch writes it."""
    model = tiny_model("llama")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_a_checkpoint_of_torch_is_read(tiny_model, tmp_path):
    torch_file(tiny_model, tmp_path)
    loaded = load_model(ModelSource(str(tmp_path)), "causal").model
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/a_pickle_ran"),))


@pytest.mark.parametrize("content", ["cut", "half", "empty", "text", "pickle", "hostile", "list", "numbers"])
def test_a_torch_file_that_holds_no_weights_is_named(tiny_model, tmp_path, content):
    file = torch_file(tiny_model, tmp_path)
    raw = file.read_bytes()
    if content in ("cut", "half"):
        file.write_bytes(raw[: -5 if content == "cut" else len(raw) // 2])
    elif content in ("empty", "text"):
        file.write_bytes(b"" if content == "empty" else b"version https://git-lfs.github.com/spec/v1\n")
    elif content == "pickle":
        file.write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))
    elif content == "hostile":
        torch.save({"model.norm.weight": Hostile()}, file)
    else:
        torch.save([torch.ones(2)] if content == "list" else {"model.norm.weight": 3}, file)
    for ask in (lambda s: load_model(s, "causal"), check_files):
        with pytest.raises(LowRankKitError, match=rf"{file}'.*(fetch it or write it again|is wanted)"):
            ask(ModelSource(str(tmp_path)))
    assert not Path("/tmp/a_pickle_ran").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("where", ["../outside/{}", "/{}", "shards/../../outside/{}"])
def test_an_index_names_no_file_outside_its_folder(tiny_model, tmp_path, kind, where):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    if kind == "bin":
        torch_file(tiny_model, outside)
    else:
        tiny_model("llama").save_pretrained(outside)
    inside.mkdir()
    (inside / "shards").mkdir()
    (inside / "config.json").write_text((outside / "config.json").read_text())
    target = where.format(outside / name if where.startswith("/") else name)
    weights = dict.fromkeys(tiny_model("llama").state_dict(), target)
    (inside / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(LowRankKitError, match="a file outside its folder, which is not read"):
        load_model(ModelSource(str(inside)), "causal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[1]", "it holds a list, no dict"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}', "model-1.safetensors' is missing"),
    ],
)
def test_an_index_that_is_none_is_named(tiny_model, tmp_path, text, message):
    tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LowRankKitError, match=message):
        load_model(ModelSource(str(tmp_path)), "causal")


def test_a_folder_without_weights_says_so(tiny_model, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(LowRankKitError, match=r"has no weights: neither model\.safetensors nor pytorch_model\.bin"):
        load_model(ModelSource(str(tmp_path)), "causal")


WRONG = [
    ("hidden_size", "wide"), ("hidden_size", 0), ("hidden_size", -4), ("num_hidden_layers", "x"),
    ("num_hidden_layers", 1.5),
    ("num_attention_heads", 0), ("num_attention_heads", None), ("vocab_size", []), ("vocab_size", None),
    ("intermediate_size", {}), ("hidden_act", "no_such"), ("hidden_act", 3), ("rope_parameters", "no"),
    ("model_type", 3), ("model_type", None), ("dtype", "float9"), ("dtype", 7), ("pad_token_id", "x"),
    ("id2label", 4), ("id2label", ["a"]), ("tie_word_embeddings", "maybe"), ("head_dim", 0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_configuration_with_an_impossible_value_is_one_message(tiny_model, tmp_path, key, value):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    source = ModelSource(str(tmp_path))

    def as_a_run_does():
        skeleton(load_config(source), "causal")
        load_model(source, "causal")

    with pytest.raises(LowRankKitError, match=str(tmp_path)):
        as_a_run_does()


LINEAR, OTHER = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
RANKS = [
    *(None, 3, [LINEAR], "all", {LINEAR: None}, {"": 4}, {"model.layers.9.mlp.up_proj": 4}, {"model.norm": 4}),
    *({LINEAR: rank} for rank in ("4", 4.0, 0, -1, 33, True, [4], {"rank": 4}, 10**30)),
    *({"model": 4}, {"..": 4}),
]
SHARED = [
    *(None, 3, {LINEAR: 3}, {LINEAR: "nowhere"}, {LINEAR: LINEAR}, {LINEAR: "model.layers.1.mlp.down_proj"}),
    {LINEAR: OTHER, OTHER: LINEAR},
]
SHAPES = [
    *(None, 3, [OTHER], {OTHER: 4}, {OTHER: [4]}, {OTHER: [4, "8"]}, {OTHER: [0, 8]}, {OTHER: [4, 8, 2]}),
    *({OTHER: [True, 8]}, {"model.norm": [4, 8]}),
]
PIVOTS = [None, 3, {OTHER: 4}, {LINEAR: 5}, {LINEAR: -1}, {LINEAR: True}, {LINEAR: "4"}, {"nowhere": 4}]
NO_LOWRANK = [
    *(None, 3, [], "none", {}, {"ranks": {LINEAR: 4}}, {"shared_down": {}}),
    *({"ranks": ranks, "shared_down": {}} for ranks in RANKS),
    *({"ranks": {LINEAR: 4, OTHER: 4}, "shared_down": shared} for shared in SHARED),
    {"ranks": {LINEAR: 4, OTHER: 5}, "shared_down": {LINEAR: OTHER}},
    *({"ranks": {LINEAR: 4}, "shared_down": {}, "pivot_rows": pivots} for pivots in PIVOTS),
    *({"ranks": {}, "shared_down": {}, "shapes": shapes} for shapes in SHAPES),
    *({"ranks": {}, "shared_down": {}, "shortcuts": names} for names in (3, "model", [3], ["model.norm"], ["nowhere"])),
]


@pytest.mark.parametrize("lowrank", NO_LOWRANK, ids=repr)
def test_a_compressed_configuration_that_describes_nothing_is_one_message(tiny_model, tmp_path, lowrank):
    model = tiny_model("llama")
    replace_linear(model, LINEAR, LowRankFactors(torch.ones(48, 4), torch.ones(4, 32)))
    save_compressed(model, tmp_path / "saved")
    file = tmp_path / "saved/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lowrank": lowrank}))
    source = ModelSource(str(file.parent))
    for ask in (lambda: skeleton(load_config(source), "causal"), lambda: load_model(source, "causal")):
        with pytest.raises(LowRankKitError, match=str(file.parent)):
            ask()
