"""Astra on every linear of a real causal model, at full size."""

import pytest
import torch

from lowrank_kit.calibration.collect import calibrate
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.methods.astra import Astra
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.training.adapters import attach

pytestmark = [pytest.mark.nightly, pytest.mark.assets]
SMOLLM2 = ModelSource("packaged://smollm2_135m")


@pytest.fixture(scope="module")
def sequences(asset):
    asset("smollm2_135m")
    asset("running_text")
    text = "\n\n".join(PackagedSource().load(DatasetRef("text/wikipedia"), "train").dataset["text"])
    return load_tokenizer(SMOLLM2)(text, return_tensors="pt")["input_ids"][0][: 17 * 256].split(256)


@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize("subspace", ["tail", "top"])
def test_the_adapted_model_starts_as_the_original(sequences, subspace, base):
    model = load_model(SMOLLM2, "causal").model.eval()
    layout, fresh = layout_of(model), sequences[-1][None]
    with torch.no_grad():
        before = model(fresh).logits
    method = Astra(name="astra", rank=128, subspace=subspace, base=base)
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in sequences[:-1]))
    kept = calibrate(
        model,
        layout,
        samples,
        layout.linears,
        method.needs(),
        lambda s: method.reduce(weight_of(model.get_submodule(s.ref.name)), None, s),
        batch_size=4,
    )
    plan = method.plan(layout, kept)
    factors = {
        name: method.initialise(weight_of(model.get_submodule(name)), kept[name], rank)
        for name, rank in plan.ranks.items()
    }
    assert len(factors) == 7 * 30
    adapted = attach(model, method, plan, factors, (), "CAUSAL_LM")
    with torch.no_grad():
        after = adapted.model.eval()(fresh).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
