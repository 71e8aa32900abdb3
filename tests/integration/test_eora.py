"""A quantised base and its low-rank corrections, by the command, loaded by PEFT alone."""

import re

import numpy as np
import pytest
import torch
import warm
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.eora import main

pytest.importorskip("torchao")

IDS = torch.arange(3, 27).reshape(2, 12)
SAMPLES, TOKENS, RANK = 8, 32, 6

FRESH = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
assert "lowrank_kit" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(3, 27).reshape(2, 12)).logits, out)
"""


@pytest.fixture
def words(language_arguments):
    """Model and text of a run."""
    return [word for word in language_arguments() if not word.startswith(("method=", "run."))]


@pytest.fixture
def written(tmp_path, words):
    """The folder that the command leaves."""

    def run(*options, bits=4, ranks=(RANK,)):
        chosen = [part for rank in ranks for part in ("--rank", str(rank))]
        folder = tmp_path / f"out-{bits}"
        assert main([str(folder), "--bits", str(bits), "--group", "16", *chosen, *options, *words]) == 0
        return folder

    return run


@pytest.fixture
def original(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama"))


def corrected(folder, rank):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / f"rank-{rank}")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def input_moments(model, rows):
    """Sum x x^T of every linear of the blocks, in float64."""
    sums = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            name = f"model.layers.{name}"
            module.register_forward_pre_hook(
                lambda _m, x, name=name: sums.__setitem__(
                    name, sums.get(name, 0) + np.einsum("bti,btj->ij", *[x[0].double().numpy()] * 2)
                )
            )
    model(rows)
    return sums


@pytest.fixture
def rows(texts_folder, checkpoint):
    """What the command calibrates on: the first windows of the local text's validation split."""
    text = next((texts_folder / "text/mine").glob("validation.*")).read_text()
    ids = AutoTokenizer.from_pretrained(checkpoint("llama"))(text)["input_ids"]
    return torch.tensor(ids[: SAMPLES * TOKENS]).reshape(SAMPLES, TOKENS)


def test_a_correction_is_the_optimum_of_the_outputs_error_and_eoras(written, original, rows):
    """Against the SVD of ``E C^(1/2)``, whose tail is the least error, and EoRA's projection of E on the eigenspace."""
    folder = written()
    base, adapted = AutoModelForCausalLM.from_pretrained(folder / "base"), corrected(folder, RANK)
    moments = input_moments(original, rows)
    assert len(moments) == 21
    for name, gram in moments.items():
        quantised = base.get_submodule(name).weight.dequantize()
        error = (original.get_submodule(name).weight - quantised).detach().double().numpy()
        layer = adapted.base_model.model.get_submodule(name)
        found = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double().numpy()
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        least = np.sum(np.linalg.svd(error @ root, compute_uv=False)[RANK:] ** 2)
        assert np.sum(((error - found) @ root) ** 2) == pytest.approx(least, rel=1e-4), name
        assert layer.scaling["default"] == 1
        # EoRA, section 3: the SVD of the error in the eigenspace, scaled by the roots of its values; then back.
        seen = values > 1e-9 * values[-1]
        space = vectors[:, seen] * np.sqrt(values[seen])
        u, s, vh = np.linalg.svd(error @ space, full_matrices=False)
        published = (u[:, :RANK] * s[:RANK]) @ vh[:RANK] @ np.linalg.pinv(space)
        np.testing.assert_allclose(found @ root, published @ root, atol=1e-4 * np.linalg.norm(error @ root))


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_alone_loads_it_and_more_rank_is_nearer_to_the_original(bits, written, original, tmp_path):
    folder = written(bits=bits, ranks=(2, 32))
    out = tmp_path / "logits.pt"
    for rank in (2, 32):
        words = ["-c", FRESH, str(folder / "base"), str(folder / f"rank-{rank}"), str(out)]
        warm.run(words, cwd=tmp_path, check=True)
        assert torch.equal(torch.load(out), logits(corrected(folder, rank)))
    dense, base = logits(original), logits(AutoModelForCausalLM.from_pretrained(folder / "base"))
    without, few, all_ = ((model - dense).norm() for model in (base, *(logits(corrected(folder, r)) for r in (2, 32))))
    assert all_ < 1e-3 * without < without
    assert few < without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "20"], r"q_proj has 32 inputs, no groups of 20: use --group 16"),
        (["--rank", "0"], "--rank 0: a correction has a rank of 1 at least"),
        (["task=glue/rte"], "task=glue/rte is for classifiers"),
    ],
)
def test_what_cannot_be_is_said_before_a_weight_is_read(options, message, tmp_path, words, capsys, monkeypatch):
    monkeypatch.setattr("lowrank_kit.models.quantised.load_torchao", None)
    if "task=glue/rte" in options:
        words = ["model=minilm_l6"]
    assert main([str(tmp_path / "out"), *options, *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_with_something_in_it_and_a_missing_package_are_refused(tmp_path, words, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert main([str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    monkeypatch.setattr("lowrank_kit.models.quantised.find_spec", lambda name: None)
    assert main([str(tmp_path / "new"), *words]) == 2
    assert "needs the package torchao" in capsys.readouterr().err
