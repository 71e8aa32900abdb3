"""The Python interface gives what the command gives, and what it returns is an ordinary model."""

import pytest
import torch
import warm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_kit
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute

CALIBRATION = {"samples": 6, "seq_len": 32, "batch_size": 3}
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "lowrank_kit" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
"""


@pytest.fixture
def words(language_arguments):
    return language_arguments


@pytest.fixture
def texts(texts_folder):
    return [(texts_folder / "text/mine/validation.txt").read_text()]


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "svd_llm"},
        {
            "method": "loss_svd",
            "structure": "channels",
            "storage": "pivot",
            "allocation": {"kind": "loss", "probe_seq_len": 16},
        },
        {"method": "kfac_svd", "correction": {"kind": "refine", "passes": 2}},
        {"method": "slicegpt"},
        {"method": "shortgpt"},
    ],
    ids=lambda settings: settings["method"],
)
def test_it_writes_the_checkpoint_that_the_command_writes(settings, texts, checkpoint, job, tmp_path):
    model, tokenizer = opened(checkpoint("llama"))
    found = lowrank_kit.compress(model, tokenizer, texts=texts, ratio=0.4, calibration=CALIBRATION, **settings)
    found.save_pretrained(tmp_path / "found")
    words = []
    for key, value in settings.items():
        parts = value if isinstance(value, dict) else {"kind": value}
        words += [f"{key}={parts['kind']}"] if key != "method" else []
        words += [f"method.{key}.{part}={number}" for part, number in parts.items() if part != "kind"]
    calibration = [f"calibration.{key}={value}" for key, value in CALIBRATION.items()]
    run = execute(job(*words, "method.ratio=0.4", *calibration, "run.stages=[apply]", method=settings["method"]))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "found", run / "checkpoint"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_it_returns_is_what_a_process_without_the_toolkit_loads(family, texts, checkpoint, tmp_path):
    model, tokenizer = opened(checkpoint(family))
    found = lowrank_kit.compress(
        model, tokenizer, texts=texts, method="svd_llm", rank_multiple=1, calibration=CALIBRATION
    )
    assert type(found).__name__.startswith("LowRank")
    with torch.no_grad():
        expected = found.eval()(torch.arange(3, 20)[None]).logits
    found.save_pretrained(tmp_path / "saved")
    warm.run(["-c", FRESH, str(tmp_path / "saved"), str(tmp_path / "logits.pt")], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("method", ["lora", "astra"])
def test_an_adapter_starts_where_the_model_is_and_is_exported_for_it(method, texts, checkpoint, tmp_path):
    from peft import PeftModel

    model, tokenizer = opened(checkpoint("llama"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    adapted = lowrank_kit.adapt(model, tokenizer, texts=texts, method=method, rank=4, calibration=CALIBRATION)
    with torch.no_grad():
        torch.testing.assert_close(adapted.model.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    # Any trainer: here, torch alone.
    adapted.model.train()
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        trained = adapted.model.eval()(ids).logits
    adapted.export(tmp_path / "adapter", str(checkpoint("llama")))
    base, _ = opened(checkpoint("llama"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-4)
    assert (trained - expected).abs().max() > 1e-3


def test_what_cannot_be_is_said_before_the_work(texts, checkpoint):
    model, tokenizer = opened(checkpoint("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for settings, message in (
        ({"method": "svd_lm"}, "svd_llm"),
        ({"method": "lora"}, "lowrank_kit.adapt"),
        ({"method": "svd_llm", "ratoi": 0.4}, "ratio"),
        ({"method": "svd_llm", "storage": "pivots"}, "pivot"),
        ({"method": "svd_llm", "ratio": 1.4}, "less than 1"),
        ({"method": "svd_llm", "ratio": 0.4, "calibration": {"samples": 10**6}}, "samples=1000000"),
    ):
        with pytest.raises(ConfigError, match=message):
            lowrank_kit.compress(model, tokenizer, texts=texts, **settings)
    with pytest.raises(ConfigError, match=r"lowrank_kit\.compress"):
        lowrank_kit.adapt(model, tokenizer, texts=texts, method="svd_llm")
    with pytest.raises(LowRankKitError, match="calibration set is empty"):
        lowrank_kit.adapt(model, tokenizer, method="astra")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
