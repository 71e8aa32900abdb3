"""The order of the methods on a real model, at a size that decides it."""

import json

import pytest

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.pipeline import execute

pytestmark = [pytest.mark.nightly, pytest.mark.assets]


@pytest.fixture(scope="module")
def perplexity(asset, tmp_path_factory):
    asset("smollm2_135m")
    asset("running_text")
    root = tmp_path_factory.mktemp("runs")

    def run(method: str, text: str, ratio: float = 0.4) -> float:
        words = [
            *(f"method={method}", f"method.ratio={ratio}", "task=perplexity", "task.window=512", "eval.limit=32"),
            *("calibration.samples=64", "calibration.seq_len=512", "task.calibrate_on=wikipedia", f"run.root={root}"),
        ]
        [config] = Composer().jobs(force_dotted(words), multirun=False)
        records = json.loads((execute(config) / "results.json").read_text())
        return next(r["value"] for r in records if (r["task"], r["checkpoint"]) == (text, "final"))

    return run


@pytest.mark.parametrize("text", ["wikipedia", "openwebtext"])
def test_knowing_the_loss_beats_knowing_the_outputs_beats_knowing_the_weights(perplexity, text):
    found = [perplexity(method, text) for method in ("loss_svd", "kfac_svd", "svd_llm", "svd")]
    assert found == sorted(found)
