import copy
from unittest import mock

import pytest
import torch

from lowrank_kit.allocations.energy_svd import EnergySvd
from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.zs_svd import ZeroSum
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.probe import LossProbe
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.portable import LowRankLinear
from lowrank_kit.truncations import decompose as module
from lowrank_kit.truncations.fisher import Fisher
from lowrank_kit.truncations.joint import Joint
from lowrank_kit.truncations.plain import Plain
from lowrank_kit.truncations.scaled import Scaled
from lowrank_kit.truncations.two_sided import TwoSided

FAMILIES = [
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text"),
    *("gemma4_text", "olmo2", "cohere2", "phi3", "opt", "gpt2"),
]


def compress(model, method, samples, cache=None):
    context = Context(model, layout_of(model), samples, **({"cache": cache} if cache else {}))
    found = method.calibrate(context)
    plan = method.decide(layout_of(model), found.candidates, None)
    method.apply(plan, found, context)
    return plan, found


@torch.no_grad()
def outputs_of(model, samples):
    """Inputs and outputs of every linear in the original model."""
    seen, handles = {}, []
    for ref in layout_of(model).linears:

        def hook(_module, inputs, output, name=ref.name):
            seen.setdefault(name, []).append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

        handles.append(model.get_submodule(ref.name).register_forward_hook(hook))
    for sample in samples.sequences:
        model(input_ids=sample["input_ids"][None])
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(part).double() for part in zip(*parts, strict=True)) for name, parts in seen.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_cut_optimally_for_its_own_outputs(family, tiny_model, samples, method):
    model = tiny_model(family)
    original, seen = copy.deepcopy(model), outputs_of(model, samples)
    plan, _ = compress(model, method(), samples)
    assert plan.parameters_after <= 0.6 * plan.parameters_before
    for name, (x, _) in seen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        wanted = x @ weight_of(original.get_submodule(name)).double().T
        best = torch.linalg.svdvals(wanted)[plan.ranks[name] :].square().sum()
        loss = (x @ layer.dense_weight().T - wanted).square().sum()
        assert loss == pytest.approx(float(best), rel=1e-3, abs=1e-9 * float(wanted.square().sum())), name
        assert plan.scores[name] == pytest.approx(float(best) / len(x), rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("truncation", [Plain(), Fisher(), Scaled(), TwoSided(), Joint()], ids=lambda t: t.kind)
def test_every_truncation_meets_the_budget(truncation, tiny_model, samples, method):
    model = tiny_model("llama")
    plan, _ = compress(model, method(truncation=truncation), samples)
    # A shared factor is one parameter, counted once.
    left = sum(parameter.numel() for name, parameter in model.named_parameters() if "proj" in name)
    assert left == plan.parameters_after <= 0.6 * plan.parameters_before


def test_the_plain_truncation_is_the_truncated_svd(tiny_model, samples, method):
    model = tiny_model("llama")
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().double()
    plan, _ = compress(model, method(truncation=Plain()), samples)
    rank = plan.ranks["model.layers.1.self_attn.q_proj"]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found = model.model.layers[1].self_attn.q_proj.dense_weight()
    torch.testing.assert_close(found, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-6)


def test_a_sweep_over_ratios_decomposes_once(tiny_model, samples, method, tmp_path, monkeypatch):
    model = tiny_model("llama")
    first = method().calibrate(Context(model, layout_of(model), samples, tmp_path))
    monkeypatch.setattr(module, "reduce_spans", lambda *args, spans, **kwargs: iter(() if not spans else [1 / 0]))
    again = method(ratio=0.6).calibrate(Context(model, layout_of(model), samples, tmp_path))
    for ours, theirs in zip(first.candidates, again.candidates, strict=True):
        assert torch.equal(ours.tail, theirs.tail)


def test_gradients_are_collected_once_for_all_who_ask_for_the_same(tiny_model, samples, method, tmp_path, monkeypatch):
    model = tiny_model("llama")
    method(truncation=TwoSided()).calibrate(Context(model, layout_of(model), samples, tmp_path))
    monkeypatch.setattr("lowrank_kit.calibration.collect.stream_gradients", None)
    spectra = EnergySvd()
    method(allocation=spectra).calibrate(Context(model, layout_of(model), samples, tmp_path))


def test_first_order_changes_are_the_derivative_of_the_loss(tiny_model, samples, method):
    model = tiny_model("llama")
    found = method(allocation=ZeroSum()).calibrate(Context(model, layout_of(model), samples))
    windows = torch.stack([s["input_ids"] for s in samples.sequences])
    candidate = found.candidates[4]
    layer, component, step = model.get_submodule(candidate.name), 2, 1e-2
    up, down = found.decomposition.projection(candidate.name).factors(layer.weight, component + 1)
    part = (up[:, component:] @ down[component:]).float()
    weight = layer.weight.detach().clone()
    losses = []
    for sign in (1, -1):
        layer.weight.data = weight - sign * step * part
        losses.append(perplexity(model.double(), windows).nll)
        model.float()
    derivative = (losses[0] - losses[1]) / (2 * step)
    assert float(candidate.spectra["change"][component]) == pytest.approx(derivative, rel=1e-2)


def test_the_probe_measures_what_the_compressed_model_loses(tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    found = method().calibrate(Context(model, layout_of(model), samples))
    windows = torch.stack([s["input_ids"] for s in samples.sequences])
    probe = LossProbe(model, found.decomposition, windows)
    dense = perplexity(original, windows).nll
    for names in (["model.layers.2.mlp.up_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]):
        cut = copy.deepcopy(original)
        plan = method().decide(layout_of(cut), found.candidates, None)
        full = {ref.name: min(ref.out_features, ref.in_features) for ref in layout_of(cut).linears}
        plan.ranks.update({name: rank for name, rank in full.items() if name not in names})
        method().apply(plan, found, Context(cut, layout_of(cut), samples))
        change = probe.loss_change({name: plan.ranks[name] for name in names})
        assert change == pytest.approx(perplexity(cut, windows).nll - dense, abs=1e-5)
        with torch.no_grad():
            p, q = (m(windows).logits.double().log_softmax(-1) for m in (original, cut))
        diverged = probe.divergence({name: plan.ranks[name] for name in names})
        assert diverged == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name])
    again = LossProbe(model, found.decomposition, windows)
    with mock.patch.object(again, "_measured", None):
        assert again.loss_change({name: plan.ranks[name] for name in names}) == change


def test_a_matrix_left_dense_is_not_touched(tiny_model, samples, method):
    model = tiny_model("llama")
    original = copy.deepcopy(model.state_dict())
    settings = method(truncation=TwoSided(), allocation=Lagrangian(), dense=True, ratio=0.2)
    plan, _ = compress(model, settings, samples)
    dense = [r.name for r in layout_of(model).linears if plan.ranks[r.name] == min(r.in_features, r.out_features)]
    assert dense
    for name in dense:
        assert torch.equal(model.get_submodule(name).weight, original[f"{name}.weight"])


@torch.no_grad()
def test_too_few_tokens_are_said_and_cut_optimally_all_the_same(tiny_model, method, caplog):
    model, few = tiny_model("llama"), CalibrationSamples(({"input_ids": torch.arange(3, 20)},))
    seen = outputs_of(model, few)
    found = method().calibrate(Context(model, layout_of(model), few))
    assert "17 calibration tokens have 17 of the 32 directions" in caplog.text
    for name, (x, y) in seen.items():
        weight = model.get_submodule(name).weight
        up, down = found.decomposition.projection(name).factors(weight, 6)
        loss, best = (y - x @ (up @ down).T).square().sum(), torch.linalg.svdvals(y)[6:].square().sum()
        assert loss == pytest.approx(float(best), rel=1e-3)


def test_a_weight_that_is_not_finite_is_named(tiny_model, samples, method):
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(LowRankKitError, match=r"model\.layers\.2\.mlp\.down_proj"):
        method(truncation=Plain()).calibrate(Context(model, layout_of(model), samples))


def test_a_ratio_that_no_rank_can_meet_is_refused_with_the_nearest(tiny_model, method):
    layout = layout_of(tiny_model("llama"))
    with pytest.raises(ConfigError, match="nearest feasible"):
        method(ratio=0.99, rank_multiple=8).check(layout)
    with pytest.raises(ConfigError, match="exclude"):
        method(ratio=0.9, roles=("q", "k")).check(layout)


def test_excluded_roles_stay_dense_and_the_others_take_more(tiny_model, samples, method):
    model = tiny_model("llama")
    plan, _ = compress(model, method(roles=("gate", "up", "down"), ratio=0.3), samples)
    factored = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert factored == {name for name in plan.ranks if "mlp" in name}
    assert plan.parameters_after <= 0.7 * plan.parameters_before


def test_role_scope_gives_every_role_the_ratio(tiny_model, samples, method):
    model = tiny_model("llama")
    plan, found = compress(model, method(scope="role", allocation=Lagrangian(), ratio=0.5), samples)
    for role in layout_of(model).roles:
        members = [c for c in found.candidates if c.role == role]
        kept = sum(plan.ranks[c.name] * c.first_rank_cost for c in members)
        dense = sum(c.dense_cost for c in members)
        # What a role cannot spend of its own share goes to the next one.
        assert abs(kept - dense / 2) <= 2 * max(c.first_rank_cost for c in found.candidates)


def test_the_probe_measures_a_dense_matrix_dense(tiny_model, samples, method):
    """In bfloat16 a product of all its components would be another matrix."""
    model = tiny_model("llama", initializer_range=0.2).bfloat16()
    found = method().calibrate(Context(model, layout_of(model), samples))
    windows = torch.stack([s["input_ids"] for s in samples.sequences])
    probe = LossProbe(model, found.decomposition, windows)
    full = {candidate.name: candidate.full_rank for candidate in found.candidates}
    assert probe.loss_change(full) == 0
    name = "model.layers.1.mlp.up_proj"
    assert probe.loss_change(full | {name: 4}) == probe.loss_change({name: 4}) != 0
