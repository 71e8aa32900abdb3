import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.checkpoint import save_compressed, save_dense
from lowrank_kit.models.experts import list_experts, with_factors
from lowrank_kit.models.factored import pivot_rows_of, ranks_of, replace_linear, share_down, shared_downs
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_config, load_model, skeleton
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt2", "gemma3")
FAMILIES = DENSE + WITH_EXPERTS
TIED = ("llama", "gemma2", "opt")
BASES = {"gpt2": "transformer"}
SHARDED, HALF, SHARED = "qwen3", "mistral", ("llama", "phi3")
IDS = torch.arange(3, 15).reshape(2, 6)
REQUEST = ("w0 w1 w2 w3 w4", " w9 w11")

# Every script runs in the folder that holds the checkpoints; none may end with a loaded model it should not have.
LOAD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
expected = torch.load("expected.pt")
def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **OPTIONS)
    assert not any(info.values()), (folder, info)
    return model
def logits(model):
    with torch.no_grad():
        return model(expected["ids"]).logits
def equal(found, wanted):
    # Some processors' products round otherwise where a weight lies elsewhere in memory.
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
for family in expected["families"]:
    model = load(family)
    assert type(model).__module__.startswith(HOME), type(model).__module__
    assert equal(logits(model), expected[family]), family
    assert AutoTokenizer.from_pretrained(family, **OPTIONS)("w0 w1")["input_ids"] == [4, 5]
    model.save_pretrained(f"{family}-{NAME}")
    again = load(f"{family}-{NAME}")
    assert equal(logits(again), expected[family]), family
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)), family
    if family in expected["tied"]:
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight, family
"""
WITH_US_FIRST = """
import sys, lowrank_kit
assert not {"torch", "transformers"} & set(sys.modules)
OPTIONS, HOME, NAME = {}, "lowrank_kit", "here"
"""
WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "lowrank_kit":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
OPTIONS, HOME, NAME = {"trust_remote_code": True}, "transformers_modules", "there"
"""
LIKELIHOOD = """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained="llama", trust_remote_code=True, device="cpu", batch_size=1)
request = Instance(request_type="loglikelihood", doc={}, arguments=tuple(expected["request"]), idx=0)
[(found, _)] = lm.loglikelihood([request], disable_tqdm=True)
assert abs(found - expected["loglikelihood"]) < 1e-4, (found, expected["loglikelihood"])
"""
GENERATE = """
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
for family in ("llama", "gemma2", "opt"):
    model = load(family)
    with_cache, without = (model.generate(expected["ids"], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(with_cache, without), family
    assert with_cache.shape == (2, 18)
assert load("llama").generation_config.top_k == 7
"""
ADAPT = """
from peft import LoraConfig, PeftModel, get_peft_model
torch.manual_seed(0)
for targets in ("all-linear", ["down", "up"]):
    peft = get_peft_model(load("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    wrapped = {name.split(".")[-1] for name, module in peft.named_modules() if hasattr(module, "lora_A")}
    assert {"down", "up"} <= wrapped, wrapped
    optimiser = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=10.0)
    peft(expected["ids"], labels=expected["ids"]).loss.backward()
    optimiser.step()
    trained = logits(peft)
    assert not torch.allclose(trained, expected["llama"], atol=1e-4)
    peft.save_pretrained("adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load("llama"), "adapter")), trained)
"""
NEITHER = (
    WITHOUT_US
    + """
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
def refused(load):
    try:
        load("llama")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("loaded")
refused(AutoConfig.from_pretrained)
refused(AutoModelForCausalLM.from_pretrained)
refused(lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False))
refused(lambda folder: pipeline("text-generation", model=folder))
"""
)


@dataclass(frozen=True)
class Checkpoints:
    root: Path
    models: dict[str, PreTrainedModel]


def factor(model: PreTrainedModel, share: bool = False) -> PreTrainedModel:
    """Factor all linears but those of the last block's MLP, at two ranks, with random factors; pivots in block 1."""
    draw = torch.Generator().manual_seed(0)
    list_experts(model)
    refs = [ref for ref in layout_of(model).linears if ref.block < 2 or ref.role in ("q", "qkv")]
    for ref in refs:
        rank = 5 if ref.role == "o" else 8
        up, down = (
            torch.randn(*shape, generator=draw) for shape in ((ref.out_features, rank), (rank, ref.in_features))
        )
        storage = Pivot() if ref.block == 1 else Factors()
        storage.put(model, [ref.name], LowRankFactors(up / rank**0.5, down / ref.in_features**0.5))
    if share:
        first, second = (next(ref.name for ref in refs if ref.block == block) for block in (0, 1))
        share_down(model, second, first)
    return model


@torch.no_grad()
def loglikelihood(model: PreTrainedModel, ids: Tensor, continued: int) -> float:
    scores = model(ids[None]).logits[0].log_softmax(-1)
    return float(sum(scores[i - 1, ids[i]] for i in range(len(ids) - continued, len(ids))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, checkpoint) -> Checkpoints:
    root, models = tmp_path_factory.mktemp("compressed"), {}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    for family in FAMILIES:
        options = {"tie_word_embeddings": family in TIED, "dtype": "bfloat16" if family == HALF else "float32"}
        models[family] = model = factor(tiny_model(family, **options), share=family in SHARED)
        model.generation_config = GenerationConfig(top_k=7, do_sample=True)
        save_compressed(model, root / family, tokenizer, max_shard_size="20KB" if family == SHARDED else "5GB")
    ids = tokenizer("".join(REQUEST), return_tensors="pt")["input_ids"][0]
    expected = {"families": FAMILIES, "tied": TIED, "ids": IDS, "request": REQUEST}
    expected["loglikelihood"] = loglikelihood(models["llama"], ids, 2)
    with torch.no_grad():
        expected |= {family: model(IDS).logits for family, model in models.items()}
    torch.save(expected, root / "expected.pt")
    return Checkpoints(root, models)


@pytest.fixture
def fresh(saved, environment, tmp_path):
    """Run a script in a process of its own, with an empty cache of remote code and no terminal to ask."""

    def run(script: str) -> None:
        variables = environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        warm.run(["-c", script], variables, saved.root, check=True)

    return run


def test_every_family_loads_in_a_fresh_process_with_our_import_alone(saved, environment):
    # Cold: what our import brings in is what is tested.
    command = [sys.executable, "-c", WITH_US_FIRST + LOAD]
    done = subprocess.run(command, cwd=saved.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_family_loads_without_us_and_works_with_peft_generate_and_lm_eval(fresh):
    fresh(WITHOUT_US + LOAD + GENERATE + ADAPT + LIKELIHOOD)


def test_without_our_code_and_without_trust_nothing_loads(fresh):
    fresh(NEITHER)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_whole_and_says_what_it_is(saved, family):
    folder, model = saved.root / family, saved.models[family]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"lowrank_{family}"
    # By their paths in the base model, which servers build alone.
    base = f"{BASES.get(family, 'model')}."
    ranks, pivot_rows, shared = (found(model) for found in (ranks_of, pivot_rows_of, shared_downs))
    assert {base + name: rank for name, rank in config["lowrank"]["ranks"].items()} == ranks
    assert {base + name: rows for name, rows in config["lowrank"]["pivot_rows"].items()} == pivot_rows != {}
    assert {base + name: base + owner for name, owner in config["lowrank"]["shared_down"].items()} == shared
    assert [base + name for name in config["lowrank"].get("experts", [])] == with_factors(model)
    assert config["lowrank"]["format"] == 2
    assert bool(config["lowrank"]["shared_down"]) == (family in SHARED)
    assert (folder / f"modeling_lowrank_{family}.py").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 1 or family != SHARDED
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights <= stored < weights + 40_000
    assert not [entry for entry in saved.root.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_path_takes_a_compressed_checkpoint(saved, family):
    source, original = ModelSource(str(saved.root / family)), layout_of(saved.models[family])
    loaded, empty = load_model(source, "causal", saved.models[family].dtype), skeleton(load_config(source), "causal")
    # Those of which none is factored were saved as one parameter.
    for model in (loaded.model, empty):
        list_experts(model)
    layout = layout_of(loaded.model)
    assert loaded.new_modules == ()
    assert layout.linears == original.linears == layout_of(empty).linears
    assert {ref.name: ref.rank for ref in layout.linears if ref.rank} == ranks_of(saved.models[family])
    assert fingerprint(loaded.model, layout) == fingerprint(saved.models[family], original)
    with pytest.raises(ConfigError, match=r"compressed already: .* first .*layers?\.0|h\.0"):
        layout.select()
    classifier = load_model(source, "classification", num_labels=2)
    assert ranks_of(classifier.model) == ranks_of(saved.models[family])
    assert len(classifier.new_modules) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_export_is_a_stock_checkpoint_with_the_same_logits(saved, tmp_path, tiny_model, family):
    model = AutoModelForCausalLM.from_pretrained(saved.root / family, dtype=torch.float32)
    save_dense(model, tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    stock = tiny_model(family)
    assert not any(info.values())
    assert type(dense) is type(stock)
    assert dense.config.model_type == family
    assert not {"lowrank", "auto_map"} & set(json.loads((tmp_path / "dense/config.json").read_text()))
    assert not list((tmp_path / "dense").glob("*.py"))
    assert (dense.get_input_embeddings().weight is dense.get_output_embeddings().weight) == (family in TIED)
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_a_model_with_nothing_factored_is_a_stock_checkpoint(tiny_model, tmp_path):
    model = tiny_model("llama")
    save_compressed(model, tmp_path / "stock")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) is type(model)
    assert not list((tmp_path / "stock").glob("*.py"))


def test_a_failed_save_leaves_what_was_there(tiny_model, tmp_path, monkeypatch):
    save_compressed(factor(tiny_model("llama")), tmp_path / "here")
    before = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    calls = []

    def full_disk(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_compressed(factor(tiny_model("qwen3")), tmp_path / "here", max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_only_causal_language_models_are_saved(tiny_model, tmp_path):
    with pytest.raises(LowRankKitError, match="this is a LlamaForSequenceClassification, not a LlamaForCausalLM"):
        save_compressed(factor(tiny_model("llama", "classification")), tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_first_format_is_read(saved, tmp_path, family):
    """As it was written until the base model became a class of ours: names from the whole model on, no format."""
    shutil.copytree(saved.root / family, tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    base = f"{BASES.get(family, 'model')}."
    old = {"ranks": ranks_of(saved.models[family]), "shared_down": shared_downs(saved.models[family])}
    old["pivot_rows"] = pivot_rows_of(saved.models[family])
    if experts := with_factors(saved.models[family]):
        old["experts"] = experts
    assert all(name.startswith(base) for name in old["ranks"])
    del config["auto_map"]["AutoModel"]
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"lowrank": old}))
    model = load_model(ModelSource(str(tmp_path / "old")), "causal", saved.models[family].dtype).model
    weights, written = model.state_dict(), saved.models[family].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in written.items() if name in weights)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, saved.models[family](IDS).logits, rtol=1e-5, atol=1e-6)
    save_compressed(model, tmp_path / "new")
    new = json.loads((tmp_path / "new/config.json").read_text())
    assert new["lowrank"] == json.loads((saved.root / family / "config.json").read_text())["lowrank"]


def test_a_checkpoint_of_a_newer_format_says_so(saved, tmp_path):
    shutil.copytree(saved.root / "llama", tmp_path / "newer")
    config = json.loads((tmp_path / "newer/config.json").read_text())
    config["lowrank"]["format"] = 3
    (tmp_path / "newer/config.json").write_text(json.dumps(config))
    with pytest.raises(LowRankKitError, match=r"lowrank.format is 3.* up to 2.* newer lowrank_kit"):
        load_model(ModelSource(str(tmp_path / "newer")), "causal")


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_truncated_file_of_weights_is_named(saved, tiny_model, tmp_path, keep):
    save_compressed(factor(tiny_model("llama")), tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LowRankKitError, match=rf"{file.name}' is damaged"):
        load_model(ModelSource(str(tmp_path)), "causal")


def test_a_missing_shard_and_a_missing_factor_are_errors(tiny_model, tmp_path):
    model = factor(tiny_model("llama"))
    save_compressed(model, tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(LowRankKitError, match="model-00001-of"):
        load_model(ModelSource(str(tmp_path)), "causal")
    save_compressed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["lowrank"]["ranks"]["layers.2.mlp.up_proj"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowRankKitError, match=r"lacks 2 weights .*2\.mlp\.up_proj\.down\.weight, .* has 1 weight \("):
        load_model(ModelSource(str(tmp_path)), "causal")


@pytest.mark.assets
def test_a_real_model_goes_through(smollm2_path, tmp_path):
    source = ModelSource(str(smollm2_path))
    model = load_model(source, "causal").model
    for ref in layout_of(model).linears[-7:]:
        left, values, right = torch.linalg.svd(model.get_submodule(ref.name).weight.detach(), full_matrices=False)
        replace_linear(model, ref.name, LowRankFactors(left[:, :96] * values[:96], right[:96]))
    save_compressed(model, tmp_path / "half", dtype=torch.bfloat16)
    save_compressed(model, tmp_path / "whole")
    loaded = load_model(ModelSource(str(tmp_path / "whole")), "causal").model
    save_dense(loaded, tmp_path / "dense")
    dense = load_model(ModelSource(str(tmp_path / "dense")), "causal").model
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        torch.testing.assert_close(dense(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert load_config(ModelSource(str(tmp_path / "half"))).dtype == torch.bfloat16
