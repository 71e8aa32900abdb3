"""How well each precision finds the directions that real activations use least."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of

RANK = 32
SAMPLES = 48


@pytest.mark.assets
def test_float32_products_find_the_float64_tail_and_bfloat16_ones_do_not(minilm_path, asset):
    with (asset("running_text") / "text" / "wikipedia" / "train.jsonl").open() as rows:
        texts = [json.loads(next(rows))["text"] for _ in range(SAMPLES)]
    # Two blocks of the six: the deviation is one of a layer, not of depth.
    model = AutoModel.from_pretrained(minilm_path, num_hidden_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    samples = replace(CalibrationSamples.from_padded([encoded]), batch_size=16)
    method = Astra(name="astra", rank=RANK)
    layout = layout_of(model)
    targets = method.targets(layout)

    def reduce(statistics):
        module = model.get_submodule(statistics.ref.name)
        return method.reduce(weight_of(module), module.bias, statistics)

    kept = calibrate(model, samples, targets, Reduction(method.needs(), reduce))
    exact = output_grams(model.double(), targets, samples, torch.float64)
    half = output_grams(model, targets, samples, torch.bfloat16)
    from_float32, from_bfloat16 = [], []
    for ref in targets:
        weight, bias = model.get_submodule(ref.name).weight, model.get_submodule(ref.name).bias
        # One direction more: layer norm confines its outputs to a hyperplane, and whether that null direction
        # counts as part of the numerical range is up to round-off.
        true = tail(exact[ref.name], weight, bias, RANK + 1)
        from_float32.append(share_inside(kept[ref.name]["basis"].double(), true))
        from_bfloat16.append(share_inside(tail(half[ref.name], weight, bias, RANK), true))
    assert min(from_float32) >= 0.99
    assert sorted(from_bfloat16)[len(targets) // 2] < 0.9


def output_grams(model, targets, samples, dtype):
    """Grams of the outputs, products and sums in one dtype throughout; every sample alone, without padding."""
    grams = {}

    def hook(name):
        def add(_module, _inputs, output):
            rows = output.detach()[0].to(dtype)
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return add

    handles = [model.get_submodule(ref.name).register_forward_hook(hook(ref.name)) for ref in targets]
    with torch.no_grad():
        for sample in samples.sequences:
            model(**{name: values[None] for name, values in sample.items()})
    for handle in handles:
        handle.remove()
    return grams


def tail(gram, weight, bias, count):
    """The smallest eigenvectors inside the span of [W b]."""
    span = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1).detach().double(), full_matrices=False).U
    return span @ torch.linalg.eigh(span.T @ gram.double() @ span).eigenvectors[:, :count]


def share_inside(basis, subspace):
    return float((subspace.T @ basis).square().sum() / basis.shape[1])
