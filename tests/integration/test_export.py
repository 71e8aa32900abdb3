import json
import re
import shlex

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.export import main
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.portable import LowRankLinear, PivotLinear
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.directory import run_name
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.training.initialise import adapt

IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture
def run(tiny_model, checkpoint, tmp_path):
    """A run directory with a compressed model of bfloat16 weights, and that model."""
    model = tiny_model("llama", tie_word_embeddings=True, dtype="bfloat16")
    for ref in layout_of(model).linears[:9]:
        storage = Pivot() if ref.role in ("q", "v", "down") else Factors()
        up, down = torch.randn(ref.out_features, 5), torch.randn(5, ref.in_features) / 32
        storage.put(model, [ref.name], LowRankFactors(up, down))
    save_compressed(model, tmp_path / "run/checkpoint", AutoTokenizer.from_pretrained(checkpoint("llama")))
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_dense_in_float32_has_the_logits_of_the_factors(run, tmp_path, capsys, inside):
    assert main([str(run / inside), "--format", "dense", "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.endswith(f"dense checkpoint: {tmp_path / 'out'}\n")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factored = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    assert type(dense).__name__ == "LlamaForCausalLM"
    assert dense.dtype == torch.float32
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w0")["input_ids"] == [4]
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, factored(IDS).logits, rtol=0, atol=1e-5)


def test_dense_keeps_the_stored_dtype_and_rounds_once(run, tmp_path):
    assert main([str(run), "--format", "dense", "--output", str(tmp_path / "out")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factored = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    layers = [(n, m) for n, m in factored.named_modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == 9
    for name, layer in layers:
        down = layer.down.weight.detach().double().numpy()
        product = torch.from_numpy(layer.up.weight.detach().double().numpy() @ down)
        if isinstance(layer, PivotLinear):
            product = torch.cat([torch.from_numpy(down), product])[layer.index]
        assert torch.equal(dense.get_submodule(name).weight, product.to(torch.bfloat16))


def test_lowrank_keeps_the_factors(run, tmp_path):
    words = ["--format", "lowrank", "--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert main([str(run), *words]) == 0
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factored = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    assert copy.config.lowrank == factored.config.lowrank
    with torch.no_grad():
        assert torch.equal(copy(IDS).logits, factored(IDS).logits)


def test_serve_writes_shared_factors_out_in_round_ranks_with_all_that_a_server_reads(tiny_model, checkpoint, tmp_path):
    model = tiny_model("llama")
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    Factors().put(model, names, LowRankFactors(torch.randn(96, 5), torch.randn(5, 32) / 32))
    model.generation_config = GenerationConfig(top_k=7, do_sample=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_compressed(model, tmp_path / "run/checkpoint", tokenizer)
    words = ["--format", "serve", "--multiple", "8", "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "run"), *words]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    names = [name.removeprefix("model.") for name in names]
    assert config["lowrank"] == {"format": 2, "ranks": dict.fromkeys(names, 8), "shared_down": {}}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"generation_config.json", "chat_template.jinja", "README.md", "modeling_lowrank_llama.py"}
    assert "vllm serve out --trust-remote-code" in (tmp_path / "out/README.md").read_text()
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    words = ["--format", "lowrank", "--output", str(tmp_path / "shared")]
    assert main([str(tmp_path / "run"), *words]) == 0
    assert "--format serve" in (tmp_path / "shared/README.md").read_text()


def test_wrong_commands_say_what_to_do_and_write_nothing(run, tmp_path, capsys):
    adapter = tmp_path / "lora/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    for source, target, message in (
        (tmp_path / "lora", output, f"'{adapter}' is plain PEFT LoRA"),
        (adapter, output, f"'{adapter}' is plain PEFT LoRA"),
        (tmp_path / "empty", output, "has neither checkpoint/config.json"),
        (tmp_path / "absent", output, "is not a folder"),
        (run, run, "exists and is not an empty folder"),
    ):
        assert main([str(source), "--format", "dense", "--output", str(target)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(run), "--format", "dense", "--multiple", "8", "--output", str(output)]) == 2
    assert "--multiple is for --format serve" in capsys.readouterr().err
    assert not output.exists()
    shard = run / "checkpoint/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main([str(run), "--format", "dense", "--output", str(output)]) == 1
    assert "model.safetensors' is damaged" in capsys.readouterr().err
    assert not output.exists()


def test_an_adapter_is_written_with_its_card(tiny_model, tmp_path, capsys):
    adapter = tmp_path / "run/adapter"
    ready = adapt(tiny_model("bert", "classification"), Lora(name="lora"), CalibrationSamples(()), task_type="SEQ_CLS")
    ready.export(adapter, "base")
    assert main([str(tmp_path / "run"), "--format", "lora", "--output", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json"
    }  # fmt: skip
    assert not (adapter / "README.md").exists()
    assert main([str(tmp_path), "--format", "lora", "--output", str(tmp_path / "other")]) == 2
    assert "has no adapter" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything, and remembers what it took."""
    taken = {}

    def upload(self, *, repo_id, folder_path):
        taken.update({file.name: file.read_bytes() for file in folder_path.iterdir()})
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    return taken


@pytest.mark.parametrize("style", ["lowrank", "lora"])
def test_what_is_published_names_no_folder_of_this_machine_and_says_how_to_make_it_again(
    config, language_arguments, composed, sharp_checkpoint, tmp_path, hub, style
):
    wanted = (
        config("method=astra")
        if style == "lora"
        else composed(language_arguments("method.ratio=0.4", path=sharp_checkpoint))
    )
    folder = execute(wanted)
    published = ["--format", style, "--output", str(tmp_path / "out"), "--push-to-hub", "me/small"]
    assert main([str(folder), *published]) == 0
    assert "README.md" in hub
    here = str(tmp_path.parent).encode()
    assert [name for name, content in hub.items() if here in content] == []
    base, rows = wanted.model.path, wanted.data.root
    card = hub["README.md"].decode()
    assert f"PATH_TO/{base.rpartition('/')[2]}" in card
    # What the reader does: the command, with folders of his own.
    blocks = re.findall(r"```console\n(.*?)\n```", card, re.DOTALL)
    [(program, command)] = [block.split("lowrank_kit.run ") for block in blocks if "lowrank_kit.run " in block]
    assert program == "python -m "
    own = {f"model.path=PATH_TO/{base.rpartition('/')[2]}": f"model.path={base}"}
    own |= {f"data.root=PATH_TO/{rows.rpartition('/')[2]}": f"data.root={rows}"}
    assert run_name(composed([own.get(word, word) for word in shlex.split(command)])) == folder.name
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert {"method", "model", "data", "train", "seed"} <= recipe.keys()
    # Here the adapter still knows its base.
    if style == "lora":
        assert main([str(folder), "--format", "lora", "--output", str(tmp_path / "here")]) == 0
        assert json.loads((tmp_path / "here/adapter_config.json").read_text())["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("offline", "token", "message"), [(True, "hf_x", "HF_HUB_OFFLINE is set"), (False, None, "run `hf auth login`")]
)
def test_a_hub_that_cannot_be_written_to_is_found_out_before_anything_is_written(
    run, tmp_path, capsys, monkeypatch, offline, token, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    words = ["--format", "lowrank", "--output", str(tmp_path / "out"), "--push-to-hub", "me/small"]
    assert main([str(run), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_upload_that_breaks_says_where_the_model_lies(run, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", broken)
    words = ["--format", "lowrank", "--output", str(tmp_path / "out"), "--push-to-hub", "me/small"]
    assert main([str(run), *words]) == 1
    error = capsys.readouterr().err
    assert "reset by peer" in error
    assert f"hf upload me/small {tmp_path / 'out'}" in error
    assert (tmp_path / "out/README.md").is_file()
