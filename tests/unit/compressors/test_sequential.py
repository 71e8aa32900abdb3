import copy
import shutil
from dataclasses import replace

import pytest
import torch

from lowrank_kit.compressors.compressor import Context
from lowrank_kit.corrections.correction import Factorisation
from lowrank_kit.corrections.none import Uncorrected
from lowrank_kit.corrections.residual import Residual
from lowrank_kit.corrections.sequential import Sequential
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.portable import LowRankLinear
from lowrank_kit.truncations.scaled import Scaled
from lowrank_kit.truncations.two_sided import TwoSided


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
    found = method.calibrate(Context(model, layout_of(model), samples))
    plan = plan or method.decide(layout_of(model), found.candidates, None)
    method.apply(plan, found, Context(model, layout_of(model), samples))
    return plan


def all_dense(plan, layout, but=()):
    """The plan with every linear dense but those of the blocks named."""
    full = {ref.name: min(ref.out_features, ref.in_features) for ref in layout.linears if ref.block not in but}
    plan.ranks.update(full)
    return plan


def plan_of(model, method, samples):
    found = method.calibrate(Context(model, layout_of(model), samples))
    return method.decide(layout_of(model), found.candidates, None)


@pytest.mark.parametrize("correction", [Sequential(), Residual()])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_without_an_error_to_correct_nothing_changes(family, correction, tiny_model, samples, method):
    model = tiny_model(family)
    plan = all_dense(plan_of(model, method(), samples), layout_of(model))
    before = copy.deepcopy(model.state_dict())
    run(model, method(correction=correction), samples, plan)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def ridge_fit(seen, x, weight, ridge, anchor, missing=0.0):
    """argmin over V of |seen V^T - x W^T - missing|^2 + anchor |x (V - W)^T|^2 + ridge mean(diag) |V - W|^2."""
    wanted = torch.cat([x @ weight.T + missing, anchor**0.5 * x @ weight.T])
    seen = torch.cat([seen, anchor**0.5 * x])
    gram = seen.T @ seen
    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + pull, seen.T @ wanted + pull @ weight.T).T


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_a_dense_matrix_becomes_the_ridge_fit_on_the_inputs_that_it_will_see(anchor, tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(correction=Sequential(ridge=1e-3, anchor=anchor))
    plan = all_dense(plan_of(model, settings, samples), layout_of(model), but=[0])
    run(model, settings, samples, plan)
    name = "model.layers.1.self_attn.v_proj"
    x, seen = inputs_of(original, name, samples), inputs_of(model, name, samples)
    assert (x - seen).norm() > 1e-2 * x.norm()
    weight = original.get_submodule(name).weight.detach().double()
    fitted = ridge_fit(seen, x, weight, 1e-3, anchor)
    torch.testing.assert_close(model.get_submodule(name).weight.detach().double(), fitted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "addition"), [("self_attn.o_proj", "input"), ("mlp.down_proj", "middle")])
def test_what_writes_to_the_residual_stream_also_fits_what_is_missing_there(
    name, addition, tiny_model, samples, method
):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(correction=Residual(ridge=1e-3, anchor=1.0))
    plan = all_dense(plan_of(model, settings, samples), layout_of(model), but=[0])
    run(model, settings, samples, plan)
    # The stream before an addition is what the norm before the branch reads.
    norm = {"input": "input_layernorm", "middle": "post_attention_layernorm"}[addition]
    streams = [inputs_of(m, f"model.layers.1.{norm}", samples) for m in (original, model)]
    path = f"model.layers.1.{name}"
    x, seen = inputs_of(original, path, samples), inputs_of(model, path, samples)
    weight = original.get_submodule(path).weight.detach().double()
    fitted = ridge_fit(seen, x, weight, 1e-3, 1.0, streams[0] - streams[1])
    plain = ridge_fit(seen, x, weight, 1e-3, 1.0)
    assert (fitted - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(model.get_submodule(path).weight.detach().double(), fitted, rtol=0, atol=1e-5)


def test_a_ridge_of_none_is_the_one_that_errs_least_on_batches_that_it_is_not_fitted_to(tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(correction=Residual(ridge=None, anchor=1.0))
    plan = all_dense(plan_of(model, settings, samples), layout_of(model), but=[0])
    run(model, settings, samples, plan)
    paths = {"mlp.down_proj": "post_attention_layernorm", "self_attn.o_proj": "input_layernorm", "mlp.up_proj": None}
    chosen = {}
    for name, norm in paths.items():
        path = f"model.layers.1.{name}"
        x, seen = inputs_of(original, path, samples), inputs_of(model, path, samples)
        missing = torch.zeros(len(x), 1)
        if norm is not None:
            streams = [inputs_of(m, f"model.layers.1.{norm}", samples) for m in (original, model)]
            missing = streams[0] - streams[1]
        weight = original.get_submodule(path).weight.detach().double()

        def fit(rows, ridge, x=x, seen=seen, missing=missing, weight=weight):
            return ridge_fit(seen[rows], x[rows], weight, ridge, 1.0, missing[rows])

        # The last batch of three: two rows of thirty tokens.
        first, last = slice(0, 120), slice(120, 180)
        errors = {}
        for ridge in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            fitted = fit(first, ridge)
            on_new = x[last] @ weight.T + missing[last] - seen[last] @ fitted.T
            errors[ridge] = float(on_new.square().sum() + (x[last] @ (fitted - weight).T).square().sum())
        chosen[name] = min(errors, key=errors.get)
        expected = fit(slice(None), chosen[name])
        torch.testing.assert_close(model.get_submodule(path).weight.detach().double(), expected, rtol=0, atol=1e-5)
    # Thirty-two inputs and more of 120 tokens: the least ridge of all is too little.
    assert max(chosen.values()) > 1e-3


def test_a_ridge_cannot_be_chosen_by_a_single_batch(tiny_model, samples, method):
    alone = replace(samples, batch_size=6)
    with pytest.raises(ConfigError, match=r"correction\.ridge=null chooses by batches .* there is only one"):
        run(tiny_model("llama"), method(correction=Residual(ridge=None)), alone)


def test_the_residual_stream_is_followed_more_closely_than_by_outputs_alone(tiny_model, samples, method):
    original = tiny_model("llama")
    errors = []
    for correction in (Sequential(), Residual()):
        model, settings = copy.deepcopy(original), method(correction=correction)
        run(model, settings, samples)
        found, truth = (inputs_of(m, "model.norm", samples) for m in (model, original))
        errors.append((found - truth).norm())
    assert errors[1] < 0.95 * errors[0]


def test_a_family_that_changes_what_it_adds_is_corrected_without_the_stream(tiny_model, samples, method, caplog):
    original = tiny_model("gemma2")
    weights = []
    for correction in (Sequential(), Residual()):
        model = copy.deepcopy(original)
        run(model, method(correction=correction), samples)
        weights.append(model.state_dict())
    assert "gemma2 changes the outputs of o and down" in caplog.text
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_factored_matrix_is_the_best_of_its_rank_for_the_fit(tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    settings = method(correction=Sequential(ridge=1e-3, anchor=0.0))
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
    metric = {"truncation": TwoSided()} if truncation == "two_sided" else {}
    settings = method(correction=Sequential(), **metric)
    original = tiny_model("llama")
    plain, corrected = copy.deepcopy(original), copy.deepcopy(original)
    found = settings.calibrate(Context(plain, layout_of(plain), samples))
    plan = settings.decide(layout_of(plain), found.candidates, None)
    Uncorrected().factorise(Factorisation(plain, plan, found.decomposition, samples))
    run(corrected, settings, samples, plan)
    truth = logits_of(original, samples)
    errors = [(logits_of(model, samples) - truth).square().sum() for model in (plain, corrected)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_asvd_scales_by_the_magnitudes_of_the_inputs_that_the_fit_is_measured_on(anchor, tiny_model, samples, method):
    """Those of the compressed model, and of the original one as far as the anchor holds."""
    model = tiny_model("llama", initializer_range=0.2)
    original = copy.deepcopy(model)
    settings = method(truncation=Scaled(), correction=Sequential(anchor=anchor, ridge=1e-3))
    plan = run(model, settings, samples)
    name = "model.layers.1.mlp.gate_proj"
    x, seen = inputs_of(original, name, samples), inputs_of(model, name, samples)
    weight = original.get_submodule(name).weight.detach().double()
    fitted = ridge_fit(seen, x, weight, 1e-3, anchor)
    scale = ((seen.abs().mean(0) + anchor * x.abs().mean(0)) / (1 + anchor)).sqrt()
    u, s, vh = torch.linalg.svd(fitted * scale, full_matrices=False)
    rank = plan.ranks[name]
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] / scale
    found = model.get_submodule(name).dense_weight().detach().double()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_ridge_too_small_for_singular_inputs_is_named(tiny_model, samples, method):
    with pytest.raises(LowRankKitError, match=r"cannot be refitted.*method\.correction\.ridge"):
        run(tiny_model("llama"), method(correction=Sequential(anchor=0, ridge=1e-30), ratio=0.8), samples)


def test_gradients_that_left_the_cache_are_collected_again(tiny_model, samples, method, tmp_path):
    settings = method(correction=Sequential(), truncation=TwoSided())
    models = []
    for is_cleared in (False, True):
        models.append(tiny_model("llama"))
        context = Context(models[-1], layout_of(models[-1]), samples, tmp_path / str(is_cleared))
        found = settings.calibrate(context)
        plan = settings.plan(found, context)
        if is_cleared:
            shutil.rmtree(found.decomposition.gradients.folder)
        settings.apply(plan, found, context)
    assert logits_of(models[0], samples).equal(logits_of(models[1], samples))
