"""Astra on every linear of a real causal model, at full size."""

import pytest
import torch

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.training.initialise import adapt

pytestmark = [pytest.mark.nightly, pytest.mark.assets]
SMOLLM2 = ModelSource("packaged://smollm2_135m")


@pytest.fixture(scope="module")
def sequences(asset):
    asset("smollm2_135m")
    asset("running_text")
    text = "\n\n".join(PackagedSource().load(DatasetRef("text/wikipedia"), "validation").dataset["text"])
    return load_tokenizer(SMOLLM2)(text, return_tensors="pt")["input_ids"][0][: 17 * 256].split(256)


@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize("subspace", ["tail", "top"])
def test_the_adapted_model_starts_as_the_original(sequences, subspace, base):
    model = load_model(SMOLLM2, "causal").model.eval()
    fresh = sequences[-1][None]
    with torch.no_grad():
        before = model(fresh).logits
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in sequences[:-1]), batch_size=4)
    method = Astra(name="astra", rank=128, subspace=subspace, base=base)
    adapted = adapt(model, method, samples, task_type="CAUSAL_LM")
    assert len(adapted.initial) == 7 * 30
    with torch.no_grad():
        after = adapted.model.eval()(fresh).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
