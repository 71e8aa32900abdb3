"""Narrowed and sliced models as checkpoints, in processes of their own, and their methods on the run path."""

import json

import pytest
import torch
import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.slicegpt import slice_model
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import all_with
from lowrank_kit.models.checkpoint import save_compressed, save_dense
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_config, skeleton
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.rotate import sliced_layers
from lowrank_kit.models.units import units_of
from lowrank_kit.pipeline import execute
from lowrank_kit.spectral.factors import LowRankFactors

NARROW = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")
SLICEABLE = tuple(all_with(lambda architecture: architecture.plain_residual))
IDS = torch.arange(3, 27).reshape(2, 12)

WITH_US_FIRST = """
import lowrank_kit
OPTIONS, NAME = {}, "here"
"""
WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "lowrank_kit":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
OPTIONS, NAME = {"trust_remote_code": True}, "there"
"""
ROUND_TRIP = """
import torch
from transformers import AutoModelForCausalLM
expected = torch.load("expected.pt")
options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **OPTIONS)
    assert not any(info.values()), (folder, info)
    return model
for name, logits in expected["logits"].items():
    model = load(name)
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, logits), name
    with_cache, without = (model.generate(expected["ids"], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(with_cache, without), name
    model.save_pretrained(f"{name}-{NAME}")
    with torch.no_grad():
        assert torch.equal(load(f"{name}-{NAME}")(expected["ids"]).logits, logits), name
"""


def narrowed(model, blocks=(0, 2)):
    """Irregular over the blocks: the first keeps other channels than the last, and the second is whole."""
    for units in units_of(layout_of(model), blocks):
        keep_units(model, units, [1] if units.kind == "heads" else range(units.block, 48, 3))
    return model


def factored(model, block):
    for ref in [ref for ref in layout_of(model).linears if ref.block == block and ref.role in ("q", "down")]:
        draw = torch.Generator().manual_seed(0)
        up, down = (torch.randn(*s, generator=draw) / 4 for s in ((ref.out_features, 3), (3, ref.in_features)))
        replace_linear(model, ref.name, LowRankFactors(up, down))
    return model


def sliced(model, width=20):
    slice_model(model, CalibrationSamples(tuple({"input_ids": row} for row in IDS), batch_size=2), width)
    return model


def of_every_kind(tiny_model):
    models = {f"narrow-{family}": narrowed(tiny_model(family)) for family in NARROW}
    models |= {f"sliced-{f}": sliced(tiny_model(f, tie_word_embeddings=f == "llama")) for f in SLICEABLE}
    models["odd"] = sliced(tiny_model("llama"), 19)
    models["half"] = narrowed(tiny_model("mistral", dtype="bfloat16"))
    mixed = factored(factored(narrowed(tiny_model("qwen3")), 0), 1)
    drop_blocks(mixed, layout_of(mixed), (0, 2))
    models["mixed-qwen3"] = mixed
    models["mixed-sliced"] = factored(sliced(tiny_model("llama")), 1)
    return models


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("pruned")
    models = of_every_kind(tiny_model)
    for name, model in models.items():
        save_compressed(model, root / name)
    with torch.no_grad():
        logits = {name: model(IDS).logits for name, model in models.items()}
    torch.save({"ids": IDS, "logits": logits}, root / "expected.pt")
    return root


@pytest.mark.parametrize("who", [WITH_US_FIRST, WITHOUT_US], ids=["with us", "without us"])
def test_every_kind_loads_generates_and_is_saved_again_in_a_fresh_process(saved, environment, tmp_path, who):
    variables = environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warm.run(["-c", who + ROUND_TRIP], variables, saved, check=True)


def test_only_what_is_unusual_is_written(saved):
    configs = {
        name: json.loads((saved / name / "config.json").read_text())["lowrank"]
        for name in ("narrow-llama", "mixed-qwen3", "sliced-llama")
    }
    assert set(configs["narrow-llama"]) == {"format", "ranks", "shared_down", "shapes"}
    assert set(configs["sliced-llama"]) == {"format", "ranks", "shared_down", "shortcuts"}
    assert set(configs["narrow-llama"]["shapes"]) == {
        f"layers.{block}.{name}_proj"
        for block in (0, 2)
        for name in (*(f"self_attn.{role}" for role in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    assert set(configs["mixed-qwen3"]["ranks"]) == {"layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"}
    assert {name.split(".")[1] for name in configs["mixed-qwen3"]["shapes"]} == {"0", "1"}


@pytest.mark.parametrize("name", ["narrow-gemma3", "mixed-qwen3", "sliced-llama"])
def test_our_loader_and_its_skeleton_see_the_new_shapes(saved, name):
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    assert layout_of(skeleton(load_config(ModelSource(str(saved / name))), "causal")) == layout_of(model)
    assert len(sliced_layers(model)) == (3 if name == "sliced-llama" else 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed-qwen3", "mixed-sliced"])
def test_the_dense_export_multiplies_out_what_it_can(saved, tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    save_dense(model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.lowrank["ranks"] == {}
    torch.testing.assert_close(dense(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.fixture
def job(language_arguments, composed):
    def build(method, *more, family="llama"):
        return composed(language_arguments(*more, method=method, family=family))

    return build


def read(file):
    return json.loads(file.read_text())


@pytest.mark.draws
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mistral", ("llm_pruner", "method.protect_first=0", "method.protect_last=1")),
        ("llama", ("slicegpt", "method.multiple=1")),
    ],
    ids=["llm_pruner", "slicegpt"],
)
def test_a_method_runs_to_a_checkpoint_that_is_what_was_judged(method, family, job, tmp_path, texts_folder):
    run = execute(job(*method, "method.ratio=0.3", family=family))
    plan = read(run / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    matrices = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert matrices == plan["parameters_after"] <= 0.7 * plan["parameters_before"]
    text = (texts_folder / "text/mine/test.txt").read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(run / "checkpoint")(text)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    [final] = [r["value"] for r in read(run / "results.json") if r["checkpoint"] == "final"]
    assert final == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)
    assert {p.name for p in (run / "plots").iterdir()} == ({"kept_units.png"} if "llm_pruner" in method else set())
    apart = tmp_path / "apart"
    for stages in ("[calibrate,plan]", "[apply]", "[evaluate]"):
        execute(job(*method, "method.ratio=0.3", f"run.dir={apart}", f"run.stages={stages}", family=family))
    assert read(apart / "plan.json") == plan
    assert [r["value"] for r in read(apart / "results.json")] == [r["value"] for r in read(run / "results.json")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llm_pruner",), "protect all 3 blocks"),
        (("llm_pruner", "method.protect_first=0", "method.protect_last=0", "method.ratio=0.9"), "nearest feasible"),
        (("slicegpt", "method.ratio=0.95"), "nearest feasible"),
        (("slicegpt", "calibration.samples=1", "calibration.seq_len=8"), "8 calibration tokens"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(words, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(ConfigError, match=message):
        execute(job(*words))


@pytest.mark.parametrize("method", ["llm_pruner", "slicegpt"])
def test_a_pruned_model_is_not_pruned_again(method, job, saved):
    with pytest.raises(ConfigError, match="lowrank_llama"):
        execute(job(method, f"model.path={saved / 'narrow-llama'}"))
