"""Every causal family by the ordinary command: compressed, read by transformers, multiplied out again, adapted."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Starcoder2Config

from lowrank_kit.adapters.lora import Lora
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.export import main as export
from lowrank_kit.models.architectures import Architecture, Group, Stack, architecture, register, registered
from lowrank_kit.models.architectures.roles import DOWN, UP, K, O, Q, V
from lowrank_kit.models.factored import ranks_of
from lowrank_kit.models.layout import layout_of
from lowrank_kit.pipeline import execute
from lowrank_kit.training.adapters import attach

FAMILIES = sorted(set(registered()) - {"bert", "roberta", "t5"})
# Transformers reads the tests' word tokenizer as another one beside a Qwen 2.
WITH_TEXTS = [family for family in FAMILIES if family != "qwen2"]
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def words(language_arguments):
    def build(*more, **where):
        usual = ("method.ratio=0.3", "eval.limit=2", *["method.rank_multiple=1"] * ("method" not in where))
        return language_arguments(*usual, *more, **where)

    return build


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", WITH_TEXTS)
def test_a_family_is_compressed_read_back_and_multiplied_out(family, job, tiny_model, tmp_path):
    run = execute(job(family=family))
    plan = json.loads((run / "plan.json").read_text())
    compressed, info = AutoModelForCausalLM.from_pretrained(run / "checkpoint", output_loading_info=True)
    assert not any(info.values())
    layout = layout_of(compressed)
    assert {ref.name: ref.rank or ref.full_rank for ref in layout.linears} == plan["ranks"]
    original = tiny_model(family)
    removed = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in compressed.parameters())
    assert removed == plan["parameters_before"] - plan["parameters_after"] > 0
    export([str(run / "checkpoint"), "--format", "dense", "--output", str(tmp_path / "dense")])
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert type(dense) is type(original)
    assert [p.shape for p in dense.parameters()] == [p.shape for p in original.parameters()]
    assert not torch.allclose(logits(dense), logits(original), atol=1e-3)
    torch.testing.assert_close(logits(dense), logits(compressed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_family_is_plain_peft(family, tiny_model, tmp_path):
    model, method = tiny_model(family), Lora(name="lora", rank=2, alpha=2.0)
    layout = layout_of(model)
    method.check(layout)
    attached = attach(model, method, method.plan(layout, {}), {}, (), "CAUSAL_LM")
    attached.model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in attached.model.named_parameters():
            if "lora_B" in name:
                assert parameter.grad.abs().sum() > 0, name
                parameter -= parameter.grad
    attached.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert torch.equal(logits(loaded), logits(attached.model))


def test_experts_that_saw_too_few_tokens_are_left_dense_and_reported(job, caplog):
    run = execute(job("calibration.samples=2", "calibration.batch_size=2", family="mixtral"))
    plan = json.loads((run / "plan.json").read_text())
    compressed = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    refs = {ref.name: ref for ref in layout_of(compressed).linears}
    assert 0 < len(plan["starved"]) < sum(ref.expert is not None for ref in refs.values())
    for name, tokens in plan["starved"].items():
        assert tokens < refs[name].full_rank == plan["ranks"][name]
        assert refs[name].rank is None
    assert plan["parameters_after"] <= 0.7 * plan["parameters_before"]
    assert f"{len(plan['starved'])} matrices of experts saw fewer tokens" in caplog.text


def test_a_correction_is_refused_for_experts_and_not_for_the_attention(job):
    with pytest.raises(ConfigError, match=r"correction=sequential .*expert_gate.*method.roles=\[q,k,v,o\]"):
        execute(job("method.correction=sequential", family="mixtral"))
    run = execute(job("method.correction=residual", "method.roles=[q,k,v,o]", "method.ratio=0.05", family="mixtral"))
    plan = json.loads((run / "plan.json").read_text())
    assert plan["parameters_after"] <= 0.95 * plan["parameters_before"]
    # Saved as the family saves them.
    assert "experts" not in json.loads((run / "checkpoint/config.json").read_text())["lowrank"]


@pytest.mark.parametrize(
    "method", ["svd", "kfac_svd", "energy_svd", "basis_sharing", "grasp", "shortgpt", "prune_comp"]
)
def test_other_methods_take_experts_too(method, job):
    run = execute(job(method=method, family="qwen3_moe"))
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoint")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("recovery", ["lora", "factors"])
def test_compressed_experts_are_recovered_and_generate_with_their_cache(recovery, job):
    training = (f"recovery={recovery}", "recovery.data=text", "train.max_steps=2", "train.batch_size=2")
    run = execute(job(*training, family="qwen3_moe"))
    model = AutoModelForCausalLM.from_pretrained(run / "recovered")
    compressed = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, compressed.get_parameter(n))]
    assert any(".experts." in name for name in changed)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(IDS[:1], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("method", ["llm_pruner", "slicegpt"])
def test_methods_that_change_widths_refuse_them(method, job):
    more = ("method.protect_first=1", "method.protect_last=0") if method == "llm_pruner" else ()
    with pytest.raises(ConfigError, match=r"this .*mixtral"):
        execute(job(*more, method=method, family="mixtral"))


@pytest.mark.parametrize("method", ["kfac_svd", "shortgpt", "grasp"])
def test_blocks_that_read_keys_of_earlier_ones_stay_and_have_no_backward_pass(method, job):
    with pytest.raises(ConfigError, match=r"gemma4_text read keys and values .*no (removal|backward)"):
        execute(job(method=method, family="gemma4_text"))


def test_blocks_that_are_not_alike_are_not_merged(job):
    with pytest.raises(ConfigError, match=r"method=laco .*qwen3_moe differ"):
        execute(job(method="laco", family="qwen3_moe"))


def test_a_family_of_another_package_is_compressed(monkeypatch, job, tmp_path, checkpoint):
    """StarCoder2, as docs/own_family.md has it."""
    monkeypatch.setattr(architecture, "_REGISTERED", registered())
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Starcoder2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(LowRankKitError, match=r"'starcoder2' is not known.*\n.*register.*lowrank_kit.plugins"):
        execute(job(path=tmp_path / "model"))
    block = (
        Group({Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}, norm="input_layernorm"),
        Group({O: "self_attn.o_proj"}),
        Group({UP: "mlp.c_fc"}, norm="post_attention_layernorm"),
        Group({DOWN: "mlp.c_proj"}),
    )
    register(Architecture((Stack("layers", block),), "embed_tokens", "norm"), "starcoder2")
    run = execute(job(path=tmp_path / "model"))
    compressed = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    assert compressed.config.model_type == "lowrank_starcoder2"
    assert len(ranks_of(compressed)) == 12
    with pytest.raises(LowRankKitError, match="'starcoder2' is registered already"):
        register(Architecture((), "embed_tokens", None), "starcoder2")
