import json
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM

from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors import grasp as module
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.attribution import drop_change
from lowrank_kit.spectral.eigenpairs import svd
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.two_sided import TwoSided

BLOCKS, ATTENTION, MLP = (1, 2), ("q", "k", "v", "o"), ("gate", "up", "down")
RATIOS = {"llama": 0.4, "opt": 0.4}


@pytest.fixture
def lively(tiny_model) -> Callable:
    """A tiny model whose activations, biases included, are far from zero."""

    def build(family: str = "llama"):
        biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
        model = tiny_model(family, initializer_range=0.2, num_hidden_layers=4, **biases)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
        return model

    return build


@pytest.fixture
def work(samples):
    def build(model, cache=None, batch_size=3, **settings):
        method = Grasp(**({"name": "grasp", "ratio": 0.4} | settings))
        layout = layout_of(model)
        method.check(layout)
        shared = {} if cache is None else {"cache": cache}
        return Compression(method, Context(model, layout, replace(samples, batch_size=batch_size), **shared))

    return build


class ExplicitSVD(nn.Module):
    """The released code's layer: ``U diag(S) V^T`` multiplied out in every forward pass; here it keeps the bias."""

    def __init__(self, dense):
        super().__init__()
        u, s, vh = torch.linalg.svd(weight_of(dense).detach(), full_matrices=False)
        self.u, self.s, self.vh, self.bias = u, nn.Parameter(s), vh, dense.bias

    def forward(self, x):
        return linear(x, self.u @ torch.diag(self.s) @ self.vh, self.bias)

    def truncate(self, kept):
        self.u, self.vh, self.s = self.u[:, kept], self.vh[kept], nn.Parameter(self.s.detach()[kept])


def published(model, samples, blocks, ranks, batch_size, in_place=True):
    """What the published loop keeps: two sublayers a block, a backward pass through the whole model for each batch."""
    kept, explicit = {}, {}
    layout = layout_of(model)
    batches = samples.batches(batch_size, 0)
    for block in sorted(blocks, reverse=True):
        for roles in (MLP, ATTENTION):
            refs = [ref for ref in layout.linears if ref.block == block and ref.role in roles]
            dense = {ref.name: model.get_submodule(ref.name) for ref in refs}
            for name in dense:
                explicit[name] = ExplicitSVD(dense[name])
                model.set_submodule(name, explicit[name])
            for batch in batches:
                logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
                cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
            for name in dense:
                layer = explicit[name]
                score = (layer.s * layer.s.grad).abs()
                kept[name] = sorted(score.topk(ranks[name]).indices.tolist())
                if in_place:
                    layer.truncate(kept[name])
                else:
                    model.set_submodule(name, dense[name])
    return kept


@pytest.mark.parametrize("family", RATIOS)
@pytest.mark.parametrize("propagate", [True, False])
def test_it_keeps_what_the_published_loop_keeps(family, propagate, lively, work, samples):
    task = work(lively(family), blocks=BLOCKS, propagate=propagate)
    ranks = task.method.ranks(task.context.layout, BLOCKS)
    expected = published(lively(family), samples, BLOCKS, ranks, 3, in_place=propagate)
    assert task.plan().kept == expected


def test_what_was_compressed_before_has_its_say(lively, work):
    found = [work(lively(), blocks=BLOCKS, propagate=p).plan().kept for p in (False, True)]
    assert found[0] != found[1]
    last_mlp = [name for name in found[0] if name.startswith("model.layers.2.mlp")]
    assert [found[0][name] for name in last_mlp] == [found[1][name] for name in last_mlp]


SETTINGS = [
    {},
    {"propagate": True},
    {"propagate": True, "iterative": True},
    {"metric": "magnitude"},
    {"metric": "magnitude", "propagate": True, "iterative": True},
    {"choice": "contiguous"},
    {"selection": "share", "share": 0.6, "propagate": True},
    {"selection": "removed", "removed_share": 0.7},
    {"label_shift": "legacy"},
    {"truncation": Optimal()},
    {"truncation": TwoSided(), "propagate": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_plan_leaves_the_model_alone_and_a_fresh_one_becomes_the_same(settings, lively, work, tmp_path, samples):
    model = lively().train()
    model.model.layers[1].mlp.requires_grad_(False)
    lively().save_pretrained(tmp_path / "dense")
    before = {name: (p, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    task = work(model, **settings)
    task.calibrate()
    plan = task.plan()
    assert model.training
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, wanted, values) in before.items():
        assert after[name] is parameter
        assert parameter.requires_grad == wanted
        assert parameter.grad is None
        assert torch.equal(parameter, values)
    compressed = task.apply(plan).eval()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    raw = json.loads(json.dumps(asdict(plan)))
    again = work(fresh, **settings).apply(Plan(**{**raw, "kept_blocks": tuple(raw["kept_blocks"])}))
    save_compressed(again, tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    ids = samples.sequences[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, compressed(input_ids=ids).logits)
    saved = sum(p.numel() for p, _, _ in before.values()) - sum(p.numel() for p in loaded.parameters())
    assert saved == plan.parameters_before - plan.parameters_after


def test_kept_components_are_those_of_the_original_weight_and_the_bias_stays(lively, work):
    task = work(lively(), blocks=BLOCKS)
    plan = task.plan()
    model = task.apply(plan)
    for name, kept in plan.kept.items():
        dense, layer = lively().get_submodule(name), model.get_submodule(name)
        u, s, vh = svd(dense.weight)
        torch.testing.assert_close(layer.dense_weight(), u[:, kept] * s[kept] @ vh[kept], atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.down.weight.norm(dim=1), layer.up.weight.norm(dim=0))
        assert torch.equal(layer.up.bias, dense.bias)


def test_the_largest_components_of_the_optimal_truncation_are_the_optimal_truncation(lively, work, samples):
    task = work(lively(), blocks=BLOCKS, truncation=Optimal(), metric="magnitude")
    plan = task.plan()
    model, inputs = task.apply(plan), inputs_of(lively(), samples)
    for name, kept in plan.kept.items():
        assert kept == list(range(len(kept)))
        weight = lively().get_submodule(name).weight.detach().double()
        found = model.get_submodule(name).dense_weight().double()
        best = torch.linalg.svdvals(inputs[name] @ weight.T)[len(kept) :].square().sum()
        assert float((inputs[name] @ (weight - found).T).square().sum()) == pytest.approx(float(best), rel=1e-5)


def inputs_of(model, samples):
    found = {}
    for ref in layout_of(model).linears:
        module = model.get_submodule(ref.name)
        module.register_forward_pre_hook(
            lambda _, args, name=ref.name: found.setdefault(name, []).append(args[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        for sequence in samples.sequences:
            model(input_ids=sequence["input_ids"][None])
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("truncation", [Optimal(), TwoSided()])
def test_components_of_any_truncation_are_scored_by_what_the_loss_loses(truncation, lively, work, samples):
    """Autograd through a factor on every component of every matrix of the blocks."""
    task = work(lively(), blocks=BLOCKS, truncation=truncation, selection="removed", removed_share=0.7)
    plan, model = task.plan(), lively()
    names = [ref.name for ref in layout_of(model).linears if ref.block in BLOCKS]
    gates = {}
    for name in names:
        up, down = (
            part.float()
            for part in task.calibrate().decomposition.projection(name).components(weight_of(model.get_submodule(name)))
        )
        gates[name] = torch.ones(len(down), requires_grad=True)
        weight = weight_of(model.get_submodule(name)).detach()
        torch.testing.assert_close(up @ down, weight, atol=1e-5, rtol=0)
        model.get_submodule(name).forward = gated(model.get_submodule(name), up, down, gates[name])
    losses = [loss_sum(model, sequence["input_ids"][None]) for sequence in samples.sequences]
    sum(losses).backward()
    for name in names:
        rank = len(plan.kept[name])
        assert plan.kept[name] == sorted(gates[name].grad.abs().topk(rank).indices.tolist())


def gated(layer, up, down, gate):
    return lambda x: linear(linear(x, down) * gate, up, layer.bias)


def loss_sum(model, ids):
    return cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")


def test_redundant_blocks_are_those_of_least_influence(lively, work, samples):
    model = lively()
    with torch.no_grad():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            for parameter in model.model.layers[2].get_submodule(path).parameters():
                parameter *= 0.01
    plan = work(model, ratio=0.2).plan()
    assert {name.split(".")[2] for name in plan.kept} == {"2"}
    influence = block_influence(model, samples)
    assert list(plan.scores.values()) == pytest.approx(influence.tolist())
    assert list(plan.scores) == list(layout_of(model).blocks)


def test_iteration_measures_influence_again_before_every_block(lively, work, monkeypatch):
    found = iter([[0.1, 0.2, 0.3, 0.4], [0.0, 0.9, 0.8, 0.1]])

    def influence(model, *_, **__):
        assert model.config is not None
        return torch.tensor(next(found), dtype=torch.float64)

    monkeypatch.setattr(module, "block_influence", influence)
    plan = work(lively(), propagate=True, iterative=True).plan()
    assert {name.split(".")[2] for name in plan.kept} == {"0", "3"}


def test_another_ratio_or_metric_of_the_same_blocks_needs_no_pass_over_the_text(lively, work, tmp_path, monkeypatch):
    whole = work(lively(), metric="gradient", ratio=0.35).plan()
    work(lively(), cache=tmp_path).calibrate()

    def fail(*_, **__):
        raise AssertionError("the calibration text was read again")

    monkeypatch.setattr(module, "weight_gradients", fail)
    monkeypatch.setattr("lowrank_kit.calibration.influence.BlockWalk", fail)
    assert work(lively(), cache=tmp_path, metric="gradient", ratio=0.35).plan() == whole
    with pytest.raises(AssertionError, match="read again"):
        work(lively(), cache=tmp_path, label_shift="legacy").plan()


@pytest.mark.parametrize("settings", [{}, {"choice": "contiguous"}, {"blocks": BLOCKS}])
def test_plots(settings, lively, work, tmp_path):
    task = work(lively(), **settings)
    task.plot(task.plan(), tmp_path)
    expected = {"rank_map.png", "kept_ranks.png"} | ({"influence.png"} if "blocks" not in settings else set())
    assert {file.name for file in tmp_path.iterdir()} == expected


def test_quantised_weights_are_refused_by_name(lively):
    class Linear4bit(nn.Linear):
        pass

    model = lively()
    model.model.layers[1].mlp.up_proj = Linear4bit(32, 48)
    with pytest.raises(LowRankKitError, match=r"layers\.1\.mlp\.up_proj' is a .*Linear4bit.*unquantised"):
        layout_of(model)


def test_weights_that_are_not_finite_are_refused_by_name(lively, work):
    model = lively()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(LowRankKitError, match=r"layers\.2\.mlp\.up_proj cannot be decomposed: 1 of"):
        work(model, blocks=BLOCKS, metric="magnitude").plan()


@pytest.mark.assets
def test_on_a_real_model_the_first_order_change_is_that_of_dropping_a_component(smollm2_path):
    """Components with an effect of a thousandth of a nat: the sign is right, the size within 25 %.

    What is missing is the second order: it cancels between dropping and doubling, which half apart are within 2 %.
    """
    source = ModelSource("packaged://smollm2_135m")
    model, tokenizer = load_model(source, "causal").model, load_tokenizer(source)
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "validation").dataset["text"]
    ids = torch.tensor(tokenizer("\n\n".join(rows[:40]), verbose=False)["input_ids"])[: 4 * 64].view(4, 64)
    layout = layout_of(model)
    [ref] = [ref for ref in layout.linears if ref.name == "model.layers.24.self_attn.o_proj"]
    batches = CalibrationSamples(tuple({"input_ids": row} for row in ids)).batches(4, 0)
    gradient = weight_gradients(BlockWalk(model, layout, batches), [ref])[ref.name].double()
    module = model.get_submodule(ref.name)
    weight = weight_of(module).detach().clone()
    u, s, vh = svd(weight)
    predicted = drop_change(LowRankFactors(u * s, vh), gradient)

    def loss(weight):
        set_weight(module, weight.float())
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].double()
        return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    dense = loss(weight)
    for k in torch.where(predicted.abs() < 1e-3, predicted.abs(), 0).topk(4).indices.tolist():
        part = s[k] * u[:, k, None] * vh[k]
        dropped, doubled = loss(weight - part) - dense, loss(weight + part) - dense
        assert dropped == pytest.approx(float(predicted[k]), rel=0.25)
        assert (dropped - doubled) / 2 == pytest.approx(float(predicted[k]), rel=0.02)
