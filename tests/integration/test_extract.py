"""A LoRA out of a full fine-tune, which PEFT loads on the base in a process without us."""

import json

import numpy as np
import pytest
import torch
import warm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowrank_kit.export import main
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of

IDS = torch.arange(4, 36)[None]
LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
base, adapter, kind, out = sys.argv[1:]
model = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}[kind]
options = {} if kind == "causal" else {"num_labels": 3}
loaded = PeftModel.from_pretrained(model.from_pretrained(base, **options), adapter).eval()
assert not any(name.startswith("lowrank_kit") for name in sys.modules)
with torch.no_grad():
    torch.save(loaded(input_ids=torch.arange(4, 36)[None]).logits, out)
"""


def tune(model, rank=None, seed=1):
    """What training might do: every linear in the blocks moves by a product of this rank, or by anything."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ref in layout_of(model).linears:
            weight = model.get_submodule(ref.name).weight
            out, inner = weight.shape
            noise = (
                torch.randn(out, inner, generator=draw)
                if rank is None
                else torch.randn(out, rank, generator=draw) @ torch.randn(rank, inner, generator=draw)
            )
            weight += 0.05 * noise
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_difference_of_low_rank_comes_out_whole(family, checkpoint, tiny_model, tmp_path, environment, capsys):
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    tuned = tune(AutoModelForCausalLM.from_pretrained(base), rank=3)
    tuned.save_pretrained(tmp_path / "tuned")
    words = [str(tmp_path / "tuned"), "--format", "lora", "--base", str(base), "--output", str(tmp_path / "lora")]
    assert main([*words, "--rank", "3"]) == 0
    assert "ranks 3 to 3" in capsys.readouterr().out
    warm.run(
        ["-c", LOAD, str(base), str(tmp_path / "lora"), "causal", str(tmp_path / "out.pt")], environment, check=True
    )
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(tuned), rtol=1e-4, atol=1e-4)


def test_a_classifiers_head_travels_too(tiny_model, tmp_path, environment):
    base = tmp_path / "base"
    tiny_model("bert", "base").save_pretrained(base)
    torch.manual_seed(3)
    tuned = tune(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), rank=2)
    tuned.save_pretrained(tmp_path / "tuned")
    words = [str(tmp_path / "tuned"), "--format", "lora", "--base", str(base), "--output", str(tmp_path / "lora")]
    assert main([*words, "--energy", "0.999999"]) == 0
    command = ["-c", LOAD, str(base), str(tmp_path / "lora"), "classification", str(tmp_path / "out.pt")]
    warm.run(command, environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(tuned), rtol=1e-4, atol=1e-4)


@pytest.fixture
def full(tiny_model, checkpoint, tmp_path):
    """A base and what has moved anyhow, with a tokenizer."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model("llama").save_pretrained(base)
    model = tune(AutoModelForCausalLM.from_pretrained(base))
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    model.save_pretrained(tuned)
    for file in checkpoint("llama").glob("*token*"):
        (tuned / file.name).write_bytes(file.read_bytes())
    return base, tuned


def extracted(full, folder, *words):
    base, tuned = full
    assert main([str(tuned), "--format", "lora", "--base", str(base), "--output", str(folder), *words]) == 0
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).base_model.model


def products(full, adapted):
    """By linear: the whole difference, and what the adapter adds, float64."""
    base, tuned = (AutoModelForCausalLM.from_pretrained(folder) for folder in full)
    for ref in layout_of(base).linears:
        before, after = (weight_of(model.get_submodule(ref.name)).detach().double() for model in (base, tuned))
        layer = adapted.get_submodule(ref.name)
        yield ref, (after - before).numpy(), layer.get_delta_weight("default").detach().double().numpy()


def test_experts_that_are_one_parameter_are_told_apart(tiny_model, tmp_path, capsys):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_model("mixtral").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            parameter *= 2.0 if "experts" in name else 1.5
    model.save_pretrained(tuned)
    extracted((base, tuned), tmp_path / "lora", "--rank", "12")
    assert "by 100.00% at most (model.layers.0.mlp.experts" in capsys.readouterr().out
    names = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert {name.rsplit(".", 1)[1] for name in names} == {f"{role}_proj" for role in "qkvo"}


def test_by_weights_it_is_the_truncated_svd(full, tmp_path, capsys):
    adapted = extracted(full, tmp_path / "lora", "--rank", "5")
    said = capsys.readouterr().out
    assert "not in it: 1 other tensors that changed, by 10.00% at most (model.norm.weight)" in said
    for _, difference, product in products(full, adapted):
        u, s, vh = np.linalg.svd(difference, full_matrices=False)
        np.testing.assert_allclose(product, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5)


def test_by_energy_every_matrix_has_as_few_components_as_hold_so_much(full, tmp_path):
    extracted(full, tmp_path / "lora", "--energy", "0.6")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    adapted = extracted(full, tmp_path / "again", "--energy", "0.6")
    for ref, difference, _ in products(full, adapted):
        energy = np.linalg.svd(difference, compute_uv=False) ** 2
        least = int(np.searchsorted(energy.cumsum(), 0.6 * energy.sum())) + 1
        assert config["rank_pattern"].get(ref.name, config["r"]) == least


def test_a_common_budget_goes_where_a_parameter_holds_most(full, tmp_path, capsys):
    with_one, budget = AutoModelForCausalLM.from_pretrained(full[1]), 2000
    with torch.no_grad():
        # Of one matrix nothing changed, and one changed more than all others.
        base = AutoModelForCausalLM.from_pretrained(full[0])
        with_one.model.layers[0].self_attn.q_proj.weight.copy_(base.model.layers[0].self_attn.q_proj.weight)
        with_one.model.layers[1].mlp.up_proj.weight += 0.05 * torch.randn(
            with_one.model.layers[1].mlp.up_proj.weight.shape, generator=torch.Generator().manual_seed(8)
        )
    with_one.save_pretrained(full[1])
    adapted = extracted(full, tmp_path / "lora", "--parameters", str(budget))
    said = capsys.readouterr().out
    ranks = json.loads((tmp_path / "lora/adapter_config.json").read_text())["rank_pattern"]
    base_model, tuned = (AutoModelForCausalLM.from_pretrained(folder) for folder in full)
    components, spent = [], 0
    for ref in layout_of(base_model).linears:
        before, after = (weight_of(model.get_submodule(ref.name)).detach().double() for model in (base_model, tuned))
        price = sum(before.shape)
        values = np.linalg.svd((after - before).numpy(), compute_uv=False) ** 2
        components += [(value / price, price, ref.name) for value in values if value > 0]
    expected = {}
    for _, price, name in sorted(components, reverse=True):
        if spent + price <= budget:
            expected[name], spent = expected.get(name, 0) + 1, spent + price
    found = {
        name: layer.lora_A["default"].weight.shape[0]
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert "model.layers.0.self_attn.q_proj" not in found
    assert set(ranks.values()) <= set(found.values())
    assert sum(rank * sum(adapted.get_submodule(n).weight.shape) for n, rank in found.items()) <= budget
    assert found["model.layers.1.mlp.up_proj"] == max(found.values())
    # The last few components differ: an item whose next one does not fit takes no more.
    assert sum(abs(found.get(name, 0) - expected.get(name, 0)) for name in {*found, *expected}) <= 2
    assert f"{sum(rank * sum(adapted.get_submodule(n).weight.shape) for n, rank in found.items())} parameters" in said


def test_by_text_the_outputs_are_nearer_than_by_weights(full, tmp_path):
    words = " ".join(f"w{7 * n % 60}" for n in range(400))
    (tmp_path / "text.txt").write_text(words)
    chosen = {
        name: extracted(full, tmp_path / name, "--rank", "4", *more)
        for name, more in (("weights", ()), ("text", ("--text", str(tmp_path / "text.txt"))))
    }
    from transformers import AutoTokenizer

    tuned = AutoModelForCausalLM.from_pretrained(full[1])
    ids = torch.tensor(AutoTokenizer.from_pretrained(full[1])(words)["input_ids"])[None]
    reads = {}
    hooks = [
        tuned.get_submodule(ref.name).register_forward_pre_hook(
            lambda _, inputs, name=ref.name: reads.update({name: inputs[0][0].detach().double().numpy()})
        )
        for ref in layout_of(tuned).linears
    ]
    with torch.no_grad():
        tuned(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for (ref, difference, plain), (_, _, aware) in zip(
        products(full, chosen["weights"]), products(full, chosen["text"]), strict=True
    ):
        errors = [np.linalg.norm(reads[ref.name] @ (difference - product).T) for product in (plain, aware)]
        # The least that any product of rank 4 can leave of the outputs.
        least = np.sqrt((np.linalg.svd(reads[ref.name] @ difference.T, compute_uv=False)[4:] ** 2).sum())
        assert errors[1] == pytest.approx(least, rel=1e-3), ref.name
        assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "2", "--energy", "0.5"], "choose one of them"),
        (["--rank", "2", "--text", "nothing.txt"], "--text 'nothing.txt' is not a file"),
        (["--rank", "2"], "add --base MODEL"),
        (["--parameters", "9", "--energy", "0.5"], "choose one of them"),
        ([], "--rank N, --energy SHARE or --parameters N extracts one"),
        (["--base", "x"], "add --rank N, --energy SHARE or --parameters N"),
    ],
)
def test_a_wrong_command_is_answered_before_a_model_is_loaded(words, message, full, tmp_path, capsys):
    assert main([str(full[1]), "--format", "lora", "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_belong_together_are_refused(full, tiny_model, tmp_path, capsys):
    tiny_model("llama", intermediate_size=64).save_pretrained(tmp_path / "other")
    words = ["--format", "lora", "--rank", "2", "--output", str(tmp_path / "out")]
    assert main([str(full[1]), "--base", str(tmp_path / "other"), *words]) == 1
    assert "not one model before and after: model.layers.0.mlp.gate_proj.weight" in capsys.readouterr().err
    assert main([str(full[1]), "--base", str(full[1]), *words]) == 1
    assert "nothing to extract" in capsys.readouterr().err
    few = ["--format", "lora", "--parameters", "3", "--output", str(tmp_path / "out")]
    assert main([str(full[1]), "--base", str(full[0]), *few]) == 1
    assert "3 parameters are fewer than one component has: the least is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
