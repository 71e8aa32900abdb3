"""models that are evaluated while most of their weights lie elsewhere."""

import json

import pytest
from transformers import AutoModelForCausalLM

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, input_device, load_model
from lowrank_kit.pipeline import execute

# Less than one block: accelerate leaves the rest on disk and fetches it for every forward pass.
ALMOST_NOTHING = {"device_map": "auto", "max_memory": {"cpu": "20KB"}}
SPREAD = ("runtime=spread", "+runtime.options.max_memory={cpu: 20KB}")


def figures(run):
    records = json.loads((run / "results.json").read_text())
    return {(r["task"], r["metric"], r["checkpoint"]): r["value"] for r in records}


def test_a_model_that_lies_on_disk_has_the_fingerprint_of_one_in_memory(checkpoint):
    folder = checkpoint("llama")
    spread = load_model(ModelSource(str(folder)), "causal", placement=ALMOST_NOTHING).model
    assert sum(parameter.is_meta for parameter in spread.parameters()) > 10
    assert input_device(spread).type == "cpu"
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert fingerprint(spread, layout_of(spread)) == fingerprint(whole, layout_of(whole))


@pytest.mark.parametrize("method", ["none", "svd_llm"])
def test_a_spread_model_is_judged_as_a_whole_one(
    method, language_arguments, composed, questions_folder, tmp_path, monkeypatch
):
    words = ["task=smoke", "task.perplexity=true", *(["task.calibrate_on=null"] if method == "none" else [])]
    if method == "svd_llm":
        words += ["method.ratio=0.4", "method.rank_multiple=1"]
    arguments = language_arguments(*words, method=method, data=questions_folder)
    spread = figures(execute(composed([*arguments, *SPREAD, f"run.root={tmp_path / 'spread'}"])))
    # What other runs have answered is known to all: this one is to answer for itself.
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "another cache"))
    assert spread == pytest.approx(figures(execute(composed(arguments))), rel=1e-5)


def test_what_is_trained_is_not_spread(arguments, composed):
    with pytest.raises(ConfigError, match="runtime=spread is for models that are evaluated"):
        execute(composed(arguments("runtime=spread")))
