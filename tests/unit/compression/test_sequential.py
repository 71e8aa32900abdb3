import copy

import pytest
import torch

from lowrank_kit.compression.apply import factorise
from lowrank_kit.compression.decompose import decompose
from lowrank_kit.compression.sequential import factorise_sequentially
from lowrank_kit.models.factored import LowRankLinear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.truncation.two_sided import TwoSided


def inputs_of(model, name, samples):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for sample in samples.sequences:
            model(input_ids=sample["input_ids"][None])
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in seen]).double()


def logits_of(model, samples):
    with torch.no_grad():
        return torch.stack([model(input_ids=s["input_ids"][None]).logits[0] for s in samples.sequences])


def run(model, method, samples, plan=None):
    decomposition = decompose(model, method, samples, batch_size=2, cache=None)
    plan = plan or method.plan(layout_of(model), decomposition.candidates, None)
    factorise_sequentially(model, method, plan, samples, batch_size=2, gradients=decomposition.gradients)
    return plan


def all_dense(plan, layout, but=()):
    """The plan with every linear dense but those of the blocks named."""
    full = {ref.name: min(ref.out_features, ref.in_features) for ref in layout.linears if ref.block not in but}
    plan.ranks.update(full)
    return plan


def plan_of(model, method, samples):
    decomposition = decompose(model, method, samples, batch_size=2, cache=None)
    return method.plan(layout_of(model), decomposition.candidates, None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_without_an_error_to_correct_nothing_changes(family, tiny_model, samples, method):
    model = tiny_model(family)
    plan = all_dense(plan_of(model, method(), samples), layout_of(model))
    before = copy.deepcopy(model.state_dict())
    run(model, method(), samples, plan)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def ridge_fit(seen, x, weight, ridge, anchor):
    """argmin over V of |seen V^T - x W^T|^2 + anchor |x (V - W)^T|^2 + ridge mean(diag) |V - W|^2."""
    seen, x = torch.cat([seen, anchor**0.5 * x]), torch.cat([x, anchor**0.5 * x])
    wanted, gram = x @ weight.T, seen.T @ seen
    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + pull, seen.T @ wanted + pull @ weight.T).T


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_a_dense_matrix_becomes_the_ridge_fit_on_the_inputs_that_it_will_see(anchor, tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(ridge=1e-3, anchor=anchor)
    plan = all_dense(plan_of(model, settings, samples), layout_of(model), but=[0])
    run(model, settings, samples, plan)
    name = "model.layers.1.self_attn.v_proj"
    x, seen = inputs_of(original, name, samples), inputs_of(model, name, samples)
    assert (x - seen).norm() > 1e-2 * x.norm()
    weight = original.get_submodule(name).weight.detach().double()
    fitted = ridge_fit(seen, x, weight, 1e-3, anchor)
    torch.testing.assert_close(model.get_submodule(name).weight.detach().double(), fitted, rtol=0, atol=1e-5)


def test_a_factored_matrix_is_the_best_of_its_rank_for_the_fit(tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(ridge=1e-3, anchor=0.0)
    plan = run(model, settings, samples)
    name = "model.layers.1.mlp.gate_proj"
    layer, rank = model.get_submodule(name), plan.ranks[name]
    assert isinstance(layer, LowRankLinear)
    weight, seen = original.get_submodule(name).weight.detach().double(), inputs_of(model, name, samples)
    fitted = seen @ ridge_fit(seen, inputs_of(original, name, samples), weight, 1e-3, 0.0).T
    best = torch.linalg.svdvals(fitted)[rank:].square().sum()
    reached = (fitted - seen @ layer.dense_weight().T).square().sum()
    assert float(reached) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("truncation", ["optimal", "two_sided"])
def test_the_model_is_closer_to_the_original_than_without(truncation, tiny_model, samples, method):
    settings = method(truncation=TwoSided()) if truncation == "two_sided" else method()
    original = tiny_model("llama")
    plain, corrected = copy.deepcopy(original), copy.deepcopy(original)
    decomposition = decompose(plain, settings, samples, batch_size=2, cache=None)
    plan = settings.plan(layout_of(plain), decomposition.candidates, None)
    factorise(plain, plan, decomposition)
    run(corrected, settings, samples, plan)
    truth = logits_of(original, samples)
    errors = [(logits_of(model, samples) - truth).square().sum() for model in (plain, corrected)]
    assert errors[1] < 0.9 * errors[0]
