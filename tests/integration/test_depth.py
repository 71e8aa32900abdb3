import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.pipeline import execute

BLOCKS = 6


@pytest.fixture
def job(language_arguments, composed, tmp_path, tiny_model, checkpoint):
    """A run on a tiny model of six blocks."""

    def build(method, *more, family="llama"):
        folder = tmp_path / family
        count = {"n_layer": BLOCKS} if family == "gpt2" else {"num_hidden_layers": BLOCKS}
        tiny_model(family, **count).save_pretrained(folder)
        AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(folder)
        return composed(language_arguments("method.ratio=0.3", *more, method=method, path=folder))

    return build


def read(file):
    return json.loads(file.read_text())


RUNS = [
    ("shortgpt", (), "llama"),
    ("shortgpt", ("method.choice=contiguous", "method.distance=angular"), "gpt2"),
    ("shortgpt", ("method.blocks=[1,4]",), "llama"),
    ("prune_comp", (), "llama"),
    ("prune_comp", ("method.iterative=false",), "gpt2"),
    ("replace_me", (), "llama"),
    ("replace_me", ("method.objective=cosine", "method.distance=angular"), "opt"),
    ("laco", (), "llama"),
    ("laco", ("method.merged=2", "method.interval=2", "method.differences=original"), "opt"),
]


@pytest.mark.draws
@pytest.mark.parametrize(("method", "more", "family"), RUNS)
def test_a_run_ends_with_results_and_a_stock_checkpoint_of_fewer_blocks(method, more, family, job):
    run = execute(job(method, *more, family=family))
    plan, manifest = read(run / "plan.json"), read(run / "manifest.json")
    saved = read(run / "checkpoint/config.json")
    assert saved["model_type"] == family
    assert saved["n_layer" if family == "gpt2" else "num_hidden_layers"] == 4 == len(plan["kept_blocks"])
    assert plan["parameters_after"] == plan["parameters_before"] * 4 // 6
    sizes = manifest["size"]
    gone = sizes["dense"]["parameters"] - sizes["compressed"]["parameters"]
    assert gone >= plan["parameters_before"] - plan["parameters_after"]
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    assert type(model).__module__.startswith("transformers.models")
    assert len(layout_of(model).blocks) == 4
    records = {r["checkpoint"]: r["value"] for r in read(run / "results.json")}
    assert set(records) == {"dense", "final"}
    assert records["dense"] != records["final"]
    picture = {"laco": "similarity.png", "replace_me": "distance.png"}.get(method, "influence.png")
    assert [file.name for file in (run / "plots").iterdir()] == [picture]


@pytest.mark.parametrize("method", ["shortgpt", "laco", "prune_comp", "replace_me"])
def test_stages_apart_give_what_one_run_gives(method, job, tmp_path):
    whole, parts = execute(job(method)), tmp_path / "parts"
    for stages in ("[calibrate]", "[plan]", "[apply]", "[train,evaluate]"):
        execute(job(method, f"run.dir={parts}", f"run.stages={stages}"))
    assert read(whole / "plan.json") == read(parts / "plan.json")
    assert [r["value"] for r in read(whole / "results.json")] == [r["value"] for r in read(parts / "results.json")]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("shortgpt", ["method.ratio=0.95"], "all 6 blocks would have to go"),
        ("shortgpt", ["method.blocks=[7]"], "no block 7; legal are 0 to 5"),
        ("shortgpt", ["method.blocks=[0]"], "lower method.ratio to 0.1666"),
        ("shortgpt", ["method.choice=both"], "contiguous"),
        ("replace_me", ["calibration.samples=1", "calibration.seq_len=16"], "16 calibration tokens cannot determine"),
        ("laco", ["method.lowest=4"], "no room for a merge"),
        ("laco", ["method.merged=1"], "merged"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(method, settings, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(ConfigError, match=message):
        execute(job(method, *settings))


def test_a_threshold_that_lets_too_few_blocks_go_is_a_failure_with_advice(job):
    with pytest.raises(LowRankKitError, match="lower the threshold below it"):
        execute(job("laco", "method.threshold=1.0"))
