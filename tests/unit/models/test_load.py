import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)


@pytest.fixture
def saved(tiny_model, tmp_path):
    def save(family: str, head: str, **config: object) -> ModelSource:
        tiny_model(family, head, **config).save_pretrained(tmp_path)
        return ModelSource(str(tmp_path))

    return save


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def tokenizer_without_pad(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 2, "a": 3, "<unk>": 4}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.mark.parametrize(
    ("family", "saved_head", "head", "new"),
    [
        ("llama", "causal", "causal", ()),
        ("llama", "causal", "classification", ("score",)),
        ("gpt2", "causal", "classification", ("score",)),
        ("bert", "base", "classification", ("classifier",)),
        ("roberta", "base", "classification", ("classifier",)),
        ("t5", "seq2seq", "classification", ("classification_head",)),
        ("t5", "seq2seq", "seq2seq", ()),
        ("gemma3_text", "causal", "classification", ("score",)),
    ],
)
def test_new_modules_are_exactly_the_random_ones(saved, family, saved_head, head, new):
    source = saved(family, saved_head)
    torch.manual_seed(1)
    first = load_model(source, head, num_labels=3 if head == "classification" else None)
    torch.manual_seed(2)
    second = load_model(source, head, num_labels=3 if head == "classification" else None)
    assert first.new_modules == second.new_modules == new
    differ = {
        name
        for (name, one), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert all(name.startswith(tuple(f"{module}." for module in new)) for name in differ)
    assert bool(differ) == bool(new)


def test_classification_gets_its_labels_problem_type_and_dtype(saved):
    source = saved("bert", "base")
    model = load_model(source, "classification", torch.bfloat16, num_labels=1, problem_type="regression").model
    assert model.classifier.weight.shape == (1, 32)
    assert model.config.problem_type == "regression"
    assert model.dtype == torch.bfloat16


def test_classification_takes_the_pad_token_of_the_tokenizer(saved):
    source = saved("llama", "causal", pad_token_id=None)
    tokenizer_without_pad(eos_token="<eos>").save_pretrained(source.path)
    assert load_config(source).pad_token_id is None
    assert load_model(source, "classification", num_labels=2).model.config.pad_token_id == 2


def test_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    tokenizer_without_pad(eos_token="<eos>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(ModelSource(str(tmp_path))).pad_token == "<eos>"


def test_checkpoint_without_some_block_weights_is_refused(saved):
    source = saved("llama", "causal")
    config = load_config(source)
    config.num_hidden_layers = 5
    config.save_pretrained(source.path)
    with pytest.raises(LowRankKitError, match=r"lacks 18 weights .*model\.layers\.\{3,4\}\.mlp\.up_proj\.weight"):
        load_model(source, "causal")


def test_architecture_without_the_head_is_refused(saved):
    with pytest.raises(LowRankKitError, match="'t5' has no causal head"):
        load_model(saved("t5", "seq2seq"), "causal")


def test_skeleton_has_the_layout_of_the_real_model_and_no_weights(tiny_model):
    real = tiny_model("llama", "classification", num_labels=5)
    empty = skeleton(real.config, "classification", num_labels=5)
    assert layout_of(empty) == layout_of(real)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fingerprint_ignores_the_head_and_sees_every_block(saved, family):
    source = saved(family, "base")
    torch.manual_seed(1)
    model = load_model(source, "classification", num_labels=2).model
    torch.manual_seed(2)
    other = load_model(source, "classification", num_labels=3).model
    bare = load_model(source, "base").model
    layout = layout_of(model)
    expected = fingerprint(model, layout)
    assert fingerprint(other, layout_of(other)) == fingerprint(bare, layout_of(bare)) == expected
    for name in (*layout.blocks, layout.embedding):
        parameter = next(model.get_submodule(name).parameters())
        before = parameter.detach().clone()
        parameter.data.view(-1)[3] += 1e-3
        assert fingerprint(model, layout) != expected
        parameter.data.copy_(before)
    assert fingerprint(model, layout) == expected
    assert fingerprint(model.to(torch.bfloat16), layout) != expected


def test_unreachable_hub_says_what_where_and_what_to_do(offline):
    with pytest.raises(LowRankKitError, match=r"'nobody/nothing' at revision 'v1'.*cache.*packaged://minilm_l6"):
        load_config(ModelSource("nobody/nothing", revision="v1"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("packaged://smol", r"no packaged model 'smol'.*smollm2_135m"),
        ("packaged://benchmark_rows", "no packaged model"),
        ("/no/such/folder", "does not exist"),
        ("model.gguf", "does not exist"),
    ],
)
def test_impossible_paths_are_configuration_errors(path, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ModelSource(path))


def test_folder_without_config_says_what_it_holds(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"has no config\.json \(it holds weights\.bin\)"):
        load_config(ModelSource(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has no x\.gguf"):
        load_config(ModelSource(str(tmp_path), gguf_file="x.gguf"))


def test_gguf_that_is_none_is_an_error_with_its_path(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(LowRankKitError, match=r"x\.gguf"):
        load_config(ModelSource(str(tmp_path / "x.gguf")))


def test_absent_packaged_model_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path))
    with pytest.raises(LowRankKitError, match=r"python -m lowrank_kit\.assets minilm_l6.*84 MB"):
        load_config(ModelSource("packaged://minilm_l6"))


def test_a_million_blocks_are_refused_by_all_that_build_a_model(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**6}))
    source = ModelSource(str(tmp_path))
    for build in (lambda: load_model(source, "causal"), lambda: skeleton(load_config(source), "causal")):
        with pytest.raises(LowRankKitError, match="describes 1000000 blocks: no model has so many"):
            build()


def test_a_configuration_of_hundreds_of_megabytes_is_not_read(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"x": "x" * 2**27}))
    with pytest.raises(ConfigError, match=r"has 134 MB: what describes a model has 134 at most"):
        load_config(ModelSource(str(tmp_path)))
