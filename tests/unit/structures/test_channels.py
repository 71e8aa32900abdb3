"""MLPs that lose channels: on tiny models, against the model with those channels silenced and least squares."""

import copy
from dataclasses import replace

import pytest
import torch

from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.loss import Loss
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.compressors.zs_svd import ZeroSumSVD
from lowrank_kit.corrections.correction import Factorisation
from lowrank_kit.corrections.none import Uncorrected
from lowrank_kit.corrections.residual import Residual
from lowrank_kit.corrections.sequential import Sequential
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.units import channels_of
from lowrank_kit.spectral.eliminate import DAMPING
from lowrank_kit.structures.channels import Channels
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.two_sided import TwoSided

FAMILIES = ["llama", "gemma2", "opt", "gpt2"]


@pytest.fixture
def samples():
    ids = torch.randint(3, 64, (6, 30), generator=torch.Generator().manual_seed(0))
    return CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=2)


def method(kind=TruncatedSVD, **settings):
    parts = {"truncation": TwoSided(), "allocation": Lagrangian(), "structure": Channels()}
    return kind(**({"name": "any", "ratio": 0.4, "rank_multiple": 2} | parts | settings))


def compressed(model, method, samples):
    context = Context(copy.deepcopy(model), layout_of(model), samples)
    found = method.calibrate(context)
    plan = method.plan(found, context)
    return method.apply(plan, found, context), plan, found


def inputs_of(model, name, samples):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for sample in samples.sequences:
            model(input_ids=sample["input_ids"][None])
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_and_the_plan_says_what_is_left(family, tiny_model, samples):
    model, settings = tiny_model(family), method()
    found, plan, _ = compressed(model, settings, samples)
    layout = layout_of(model)
    budget = settings.budget(layout)
    # At most one step of two ranks of the largest matrix is left over.
    assert budget - 2 * (32 + 128) < plan.parameters_after <= budget
    names = [ref.name for ref in layout.linears]
    left = sum(
        parameter.numel()
        for name in names
        for key, parameter in found.get_submodule(name).named_parameters()
        if key.endswith("weight")
    )
    assert left == plan.parameters_after
    assert plan.kept
    for units in channels_of(layout):
        if units.name in plan.kept:
            kept = plan.kept[units.name]
            assert len(kept) % 2 == 0
            assert sorted(set(kept)) == kept
            assert {ref.name: [*sides] for ref, *sides in units.sides(len(kept))} == {
                ref.name: [*weight_of(found.get_submodule(ref.name)).shape] for ref in units.linears
            }
            assert all(plan.ranks[ref.name] == min(sides) for ref, *sides in units.sides(len(kept)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_mlp_has_the_rows_that_stay_and_reads_them_by_least_squares(family, tiny_model, samples):
    model = tiny_model(family)
    found, plan, _ = compressed(model, method(), samples)
    for units in channels_of(layout_of(model)):
        if units.name not in plan.kept:
            continue
        kept = plan.kept[units.name]
        for ref in units.rows:
            before, after = (weight_of(m.get_submodule(ref.name)) for m in (model, found))
            assert torch.equal(after, before[kept])
        [down] = units.columns
        x = inputs_of(model, down.name, samples)
        tokens = torch.cat([x, (DAMPING * x.square().sum(0)).sqrt().diag()])
        outputs = tokens @ weight_of(model.get_submodule(down.name)).double().T
        fitted = torch.linalg.lstsq(tokens[:, kept], outputs).solution.T
        torch.testing.assert_close(weight_of(found.get_submodule(down.name)).double(), fitted, rtol=0, atol=1e-4)
        biases = [m.get_submodule(down.name).bias for m in (model, found)]
        assert biases == [None, None] or torch.equal(*biases)


def ridge_fit(x, seen, kept, weight, missing, ridge, anchor):
    """The correction's objective by least squares, for the channels that stay.

    argmin over V of ``|seen_K V^T - y|^2 + anchor |x_K V^T - x U^T|^2 + ridge mean(diag) |V - start|^2`` around its own
    minimum for the original outputs on the same inputs: V = start + what the inputs have moved by, and the stream.
    """
    every = torch.cat([seen, anchor**0.5 * x])
    gram, read = every.T @ every, every[:, kept]
    damped = torch.cat([every, (DAMPING * gram.diagonal()).sqrt().diag()])
    start = torch.linalg.lstsq(damped[:, kept], damped @ weight.T).solution
    pull = (ridge * gram.diagonal().mean()).sqrt() * torch.eye(len(kept), dtype=gram.dtype)
    moved = torch.cat([(x - seen) @ weight.T + missing, 0 * x @ weight.T, 0 * pull @ start])
    return (start + torch.linalg.lstsq(torch.cat([read, pull]), moved).solution).T


@torch.no_grad()
@pytest.mark.parametrize("correction", [Sequential(), Residual()], ids=["sequential", "residual"])
def test_a_correction_fits_what_reads_the_channels_that_stay(correction, tiny_model, samples):
    model = tiny_model("llama")
    context = Context(model, layout_of(model), samples)
    settings = method(correction=correction, roles=("gate", "up", "down"), ratio=0.2)
    found = settings.calibrate(context)
    plan = settings.plan(found, context)
    units = channels_of(layout_of(model))[1]
    kept, down = plan.kept[units.name], units.columns[0]
    # The same, but that this MLP is whole: what its channels are before some go.
    whole = replace(plan, kept={name: k for name, k in plan.kept.items() if name != units.name})
    whole.ranks.update({ref.name: ref.full_rank for ref in units.linears})
    narrow, wide = (
        settings.apply(p, found, Context(copy.deepcopy(model), layout_of(model), samples)) for p in (plan, whole)
    )
    for ref in units.rows:
        rows, every = (weight_of(m.get_submodule(ref.name)) for m in (narrow, wide))
        torch.testing.assert_close(rows, every[kept], rtol=0, atol=1e-6)
    x, seen = (inputs_of(m, down.name, samples) for m in (model, wide))
    norm = "model.layers.1.post_attention_layernorm"
    streams = [inputs_of(m, norm, samples) for m in (model, wide)]
    missing = streams[0] - streams[1] if correction.to_stream else 0 * streams[0]
    weight = weight_of(model.get_submodule(down.name)).double()
    fitted = ridge_fit(x, seen, kept, weight, missing, correction.ridge, correction.anchor)
    uncorrected = ridge_fit(x, x, kept, weight, 0 * missing, correction.ridge, correction.anchor)
    error = (weight_of(narrow.get_submodule(down.name)).double() - fitted).norm()
    assert error < 0.01 * (fitted - uncorrected).norm()


@torch.no_grad()
@pytest.mark.parametrize("correction", [Uncorrected(), Sequential(), Residual()], ids=lambda c: c.kind)
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_nothing_is_lost_with_leave_the_model_what_it_was(family, correction, tiny_model, samples):
    """Half of the channels are copies of the others."""
    model = tiny_model(family)
    for units in channels_of(layout_of(model)):
        for ref in units.rows:
            module = model.get_submodule(ref.name)
            weight = weight_of(module)
            weight[1::2] = weight[::2]
            if module.bias is not None:
                module.bias[1::2] = module.bias[::2]
    share = sum(u.cost * u.count for u in channels_of(layout_of(model))) / sum(
        ref.parameters for ref in layout_of(model).linears
    )
    roles = tuple(dict.fromkeys(ref.role for u in channels_of(layout_of(model)) for ref in u.linears))
    settings = method(ratio=share / 2, correction=correction, dense=True, roles=roles)
    found, plan, _ = compressed(model, settings, samples)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {
        u.name: u.count // 2 for u in channels_of(layout_of(model))
    }
    ids = samples.sequences[0]["input_ids"][None]
    expected, actual = model(ids).logits, found(ids).logits
    assert (expected - actual).norm() < 1e-3 * expected.norm()


def test_a_killed_correction_goes_on_behind_narrow_blocks(tiny_model, samples, tmp_path):
    model, settings = tiny_model("llama"), method(correction=Residual())
    context = Context(model, layout_of(model), samples)
    found = settings.calibrate(context)
    plan = settings.plan(found, context)

    def corrected(folder):
        work = copy.deepcopy(model)
        settings.correction.factorise(Factorisation(work, plan, found.decomposition, samples, folder=folder))
        return work.state_dict()

    whole = corrected(tmp_path / "killed")
    assert len(plan.kept) == 3
    (tmp_path / "killed" / "block-2.safetensors").unlink()
    for name, tensor in corrected(tmp_path / "killed").items():
        assert torch.equal(tensor, whole[name]), name


def test_a_measured_rule_leaves_the_model_as_it_was(tiny_model, samples):
    model, settings = tiny_model("llama"), method(allocation=Loss(depth_bias=(0.0,)))
    windows = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(5))
    before = copy.deepcopy(model.state_dict())
    context = Context(model, layout_of(model), samples, probe_windows=windows)
    plan = settings.plan(settings.calibrate(context), context)
    assert plan.parameters_after <= settings.budget(layout_of(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"truncation": Optimal()}, "truncation=two_sided"),
        ({"allocation": Uniform()}, "allocation=lagrangian or allocation=loss"),
        ({"roles": ("q", "gate", "up")}, r"method\.roles"),
        ({"scope": "role"}, r"method\.scope=global"),
        ({"kind": ZeroSumSVD, "stages": 2}, r"method\.stages=1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(settings, reason, tiny_model):
    with pytest.raises(ConfigError, match=reason):
        method(**settings).check(layout_of(tiny_model("llama")))


def test_a_family_whose_mlp_is_one_matrix_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"no MLP of separate matrices.*phi3"):
        method().check(layout_of(tiny_model("phi3")))


def test_blocks_that_are_held_keep_their_channels(tiny_model, samples):
    settings = method(allocation=Lagrangian(keep={"blocks": (0,), "at": "dense"}))
    _, plan, _ = compressed(tiny_model("llama"), settings, samples)
    assert "block 0 channels" not in plan.kept
    assert plan.kept
