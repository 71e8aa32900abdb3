"""What is collected of experts: on the tokens that were sent to them, and no others."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.statistics import GradientRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.truncations.decompose import Request, decompose
from lowrank_kit.truncations.optimal import Optimal

FAMILIES = ("mixtral", "gpt_oss", "llama4_text")


def samples_of(count, length=24):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 64, (count, length), generator=draw)
    return CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_cut_optimally_for_the_tokens_that_it_got(family, tiny_model, tmp_path):
    model, samples, seen = tiny_model(family, initializer_range=0.2), samples_of(16), {}
    list_experts(model)
    refs = [ref for ref in layout_of(model).linears if ref.expert is not None]
    found = decompose(model, Request(Optimal(), frozenset(), tuple(refs)), samples, cache=tmp_path)
    for ref in refs:
        linear = model.get_submodule(ref.name)
        linear.register_forward_pre_hook(lambda _, args, name=ref.name: seen.setdefault(name, []).append(args[0]))
    for sample in samples.sequences:
        model(input_ids=sample["input_ids"][None])
    read = {name: torch.cat(parts).double() for name, parts in seen.items()}
    assert found.starved == {r.name: len(read.get(r.name, ())) for r in refs if len(read.get(r.name, ())) < r.full_rank}
    assert len(found.groups) > len(refs) / 2
    for (ref,) in found.groups:
        outputs = read[ref.name] @ weight_of(model.get_submodule(ref.name)).double().T
        expected = torch.linalg.svdvals(outputs)[: ref.full_rank].square() / len(outputs)
        values = found.values[ref.name]
        torch.testing.assert_close(values, expected[: len(values)], rtol=1e-4, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_experts_are_those_of_the_one_parameter_that_they_were(family, tiny_model):
    model, samples = tiny_model(family, initializer_range=0.2), samples_of(5, length=10)
    stock = deepcopy(model)
    list_experts(model)
    layout = layout_of(model)
    refs = [ref for ref in layout.linears if ref.expert is not None]
    request, found = GradientRequest(fisher=True, mean=True), {}
    batches = batches_of(model, replace(samples, batch_size=3))
    for _, statistics in stream_gradients(model, layout, batches, refs, request):
        found |= statistics
    sums = {ref.name: torch.zeros(ref.out_features, ref.in_features) for ref in refs}
    squares = {ref.name: torch.zeros(ref.in_features) for ref in refs}
    for sample in samples.sequences:
        stock.zero_grad()
        ids = sample["input_ids"][None]
        logits = stock(input_ids=ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        for ref in refs:
            gradient = slice_of(stock, ref)
            sums[ref.name] += gradient
            squares[ref.name] += gradient.square().sum(0)
    for ref in refs:
        expected, square = sums[ref.name] / 45, squares[ref.name] / 45
        torch.testing.assert_close(found[ref.name].mean, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(found[ref.name].fisher.float(), square, rtol=0, atol=1e-4 * float(square.max()))


def slice_of(model, ref):
    """An expert's part of the gradient, as [out, in], read as the family's own modelling code uses the parameter."""
    path, _, part = ref.name.rsplit(".", 2)
    experts, family = model.get_submodule(path), model.config.model_type
    gradient = (experts.down_proj if part == "down" else experts.gate_up_proj).grad[ref.expert]
    gradient = gradient if family == "mixtral" else gradient.T
    if part == "down":
        return gradient
    if family == "gpt_oss":
        return gradient[::2] if part == "gate" else gradient[1::2]
    return gradient[: len(gradient) // 2] if part == "gate" else gradient[len(gradient) // 2 :]
