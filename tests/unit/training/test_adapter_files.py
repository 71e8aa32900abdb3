"""An adapter's folder is whole and fits its model, or is refused with the file and what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.export import main
from lowrank_kit.training.adapter_files import check_adapter, load_adapter
from lowrank_kit.training.initialise import adapt

NAME = "base_model.model.model.layers.1.mlp.up_proj"
METHOD = Lora(name="lora", rank=2, rank_pattern={"q": 3})


@pytest.fixture
def folder(tiny_model, tmp_path):
    ready = adapt(tiny_model("llama"), METHOD, CalibrationSamples(()), task_type="CAUSAL_LM")
    ready.export(tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def change(folder, **weights):
    """Replace weights by what a function makes of them; None takes one away."""
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    for name, make in weights.items():
        value = stored.pop(name)
        if make is not None:
            stored[name] = make(value).contiguous()
    save_file(stored, file)


def damage(folder, kind):
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if kind in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[: -9 if kind == "cut" else 0])
    elif kind == "absent":
        file.unlink()
    elif kind in ("nan", "inf"):
        change(folder, **{f"{NAME}.lora_B.weight": lambda w: w + float(kind)})
    elif kind == "half":
        change(folder, **{f"{NAME}.lora_B.weight": None})
    elif kind == "none":
        change(folder, **{f"{NAME}.lora_{part}.weight": None for part in "AB"})
    elif kind == "rank":
        change(folder, **{f"{NAME}.lora_A.weight": lambda w: w[:1]})
    elif kind == "both ranks":
        change(folder, **{f"{NAME}.lora_A.weight": lambda w: w[:1], f"{NAME}.lora_B.weight": lambda w: w[:, :1]})
    elif kind == "config rank":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
    elif kind == "config text":
        config.write_text(config.read_text()[:-20])
    elif kind == "config kinds":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": 3}))


KINDS = {
    "cut": r"adapter_model.safetensors' is damaged or was not written to its end",
    "empty": r"adapter_model.safetensors' is damaged",
    "absent": "has no weights of its adapter",
    "nan": rf"not finite, first in {NAME}\.lora_B\.weight",
    "inf": "not finite, first in",
    "half": rf"one of the two factors of {NAME} alone",
    "none": r"nothing of model\.layers\.1\.mlp\.up_proj, which adapter_config\.json names",
    "rank": r"\[48, 2\] times \[1, 32\] for model\.layers\.1\.mlp\.up_proj, whose rank is 2",
    "both ranks": r"\[48, 1\] times \[1, 32\] .* whose rank is 2",
    "config rank": "whose rank is 5 by adapter_config.json",
    "config text": "adapter_config.json' is damaged",
    "config kinds": "adapter_config.json' is damaged",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_not_whole_is_neither_loaded_nor_exported(folder, tiny_model, tmp_path, capsys, kind):
    damage(folder, kind)
    with pytest.raises(LowRankKitError, match=KINDS[kind]):
        load_adapter(tiny_model("llama"), folder)
    assert main([str(folder), "--format", "lora", "--output", str(tmp_path / "copy")]) == 1
    assert str(folder) in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_an_adapter_of_another_model_does_not_fit(folder, tiny_model):
    with pytest.raises(LowRankKitError, match=r"does not fit this LlamaForCausalLM: size mismatch .*shape"):
        load_adapter(tiny_model("llama", intermediate_size=40), folder)
    with pytest.raises(LowRankKitError, match="does not fit this GPT2LMHeadModel: Target modules"):
        load_adapter(tiny_model("gpt2"), folder)


# PEFT says the same, and goes on.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_head_or_a_magnitude_that_is_missing_is_named(tiny_model, tmp_path):
    ready = adapt(
        tiny_model("bert", "classification"), Dora(name="dora", rank=2), CalibrationSamples(()), task_type="SEQ_CLS"
    )
    for number, part in enumerate(("classifier.weight", "magnitude_vector")):
        folder = tmp_path / str(number)
        ready.export(folder, "base")
        file = folder / "adapter_model.safetensors"
        stored = load_file(file)
        name = next(name for name in stored if part in name)
        save_file({key: value for key, value in stored.items() if key != name}, file)
        check_adapter(folder)
        with pytest.raises(LowRankKitError, match=f"this BertForSequenceClassification: .*{name}"):
            load_adapter(tiny_model("bert", "classification"), folder)


def test_a_whole_one_is_loaded(folder, tiny_model):
    weights = check_adapter(folder)
    loaded = load_adapter(tiny_model("llama"), folder)
    up = loaded.get_submodule(NAME).lora_B["default"].weight
    assert torch.equal(up, weights[f"{NAME}.lora_B.weight"])
