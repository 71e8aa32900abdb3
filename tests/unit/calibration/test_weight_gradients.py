from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from lowrank_kit.calibration import backward as backward_module
from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.attribution import sigma_gradient
from lowrank_kit.spectral.eigenpairs import svd

MODELS = {
    "grouped-query attention": ("llama", {}),
    "every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "bias of q, k and v": ("qwen2", {}),
    "relu and learned positions": ("opt", {}),
    "transposed weights": ("gpt2", {}),
}


@pytest.fixture
def batches():
    """Three windows and a padded one, in two batches."""
    ids = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]


@pytest.fixture
def lively(tiny_model):
    """A tiny model whose activations, biases included, are far from zero."""

    def build(family="llama", **config):
        model = tiny_model(family, initializer_range=0.2, **config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
        return model

    return build


class ExplicitSVD(nn.Module):
    """``U diag(sigma) V^T x + b`` with sigma as a parameter, multiplied out in every forward pass."""

    def __init__(self, dense):
        super().__init__()
        u, sigma, vh = svd(weight_of(dense))
        self.u, self.vh, self.bias = u.to(dense.weight.dtype), vh.to(dense.weight.dtype), dense.bias
        self.sigma = nn.Parameter(sigma.to(dense.weight.dtype))

    def forward(self, x):
        return linear(x, self.u @ self.sigma.diag() @ self.vh, self.bias)


def sigma_gradients_by_autograd(model, batches):
    """Gradients in the singular values of every block linear, by layers that have them as parameters."""
    refs = layout_of(model).linears
    layers = {ref.name: ExplicitSVD(model.get_submodule(ref.name)) for ref in refs}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    predicted = sum(int(batch["attention_mask"][:, 1:].sum()) for batch in batches)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        (cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / predicted).backward()
    return {name: layer.sigma.grad.double() for name, layer in layers.items()}


def sigma_gradients_of(model, found):
    parts = {name: svd(weight_of(model.get_submodule(name))) for name in found}
    return {name: sigma_gradient(u, vh.T, found[name].double()) for name, (u, _, vh) in parts.items()}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_one_pass_gives_what_autograd_gives_on_explicit_singular_values(case, recompute, lively, batches, monkeypatch):
    if recompute:
        monkeypatch.setattr(backward_module, "ACTIVATION_BYTES", 0)
    family, config = MODELS[case]
    model = lively(family, **config)
    found = weight_gradients(BlockWalk(model, layout_of(model), batches), layout_of(model).linears)
    ours = sigma_gradients_of(model, found)
    reference = sigma_gradients_by_autograd(model, batches)
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_in_bfloat16_it_is_nearer_to_float32_than_explicit_singular_values_are(lively, batches):
    """Both on the same weights: within 5 % of every matrix's gradient, where autograd in bfloat16 has up to 5.5 %."""
    model = lively().bfloat16()
    found = weight_gradients(BlockWalk(model, layout_of(model), batches), layout_of(model).linears)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    ours = sigma_gradients_of(model, found)
    explicit = sigma_gradients_by_autograd(deepcopy(model), batches)
    exact = sigma_gradients_by_autograd(model.float(), batches)
    errors, of_explicit = (
        [float((other[name] - expected).norm() / expected.norm()) for name, expected in exact.items()]
        for other in (ours, explicit)
    )
    assert max(errors) <= 0.05
    assert max(errors) < max(of_explicit)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_blocks_below_build_no_graph_and_those_without_room_are_recomputed(room, lively, batches, monkeypatch):
    # 40 tokens a batch; 528 numbers go in and out of a block's linears.
    monkeypatch.setattr(backward_module, "ACTIVATION_BYTES", (room + 0.5) * 40 * 528 * 4)
    model, runs = lively(), Counter()
    layout = layout_of(model)
    for number, path in enumerate(layout.blocks):

        def count(_module, inputs, number=number):
            runs[number, inputs[0].requires_grad] += 1

        # Before, not after: the second run of a block ends as soon as the backward pass has what it needs.
        model.get_submodule(f"{path}.mlp").register_forward_pre_hook(count)
    weight_gradients(BlockWalk(model, layout, batches), [ref for ref in layout.linears if ref.block == 1])
    # The first batch runs the first block once more, to see what it returns.
    expected = {(0, False): 3, (1, False): 2 * (room < 2), (1, True): 2, (2, False): 2 * (room < 1), (2, True): 2}
    assert runs == Counter(expected)


def test_the_model_is_left_as_it_was_frozen_weights_too(lively, batches):
    model = lively().train()
    model.model.layers[1].mlp.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    layout = layout_of(model)
    assert weight_gradients(BlockWalk(model, layout, batches), layout.linears).keys() == {
        ref.name for ref in layout.linears
    }
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_pass_that_begins_at_known_hidden_states_gives_the_same(lively, batches):
    model = lively()
    layout = layout_of(model)
    refs = [ref for ref in layout.linears if ref.block == 2]
    walk, runs = BlockWalk(model, layout, batches), Counter()
    whole = weight_gradients(walk, refs)
    walk.keep([1, 2])
    for number, path in enumerate(layout.blocks):
        model.get_submodule(f"{path}.mlp").register_forward_hook(lambda *_, number=number: runs.update([number]))
    begun = weight_gradients(walk, refs)
    assert set(runs) == {2}
    for name, expected in whole.items():
        assert torch.equal(begun[name], expected)


def test_two_tokens_ahead_is_the_loss_of_labels_shifted_twice(lively, batches):
    batches = [{name: values[:1] for name, values in batch.items()} for batch in batches]
    model = lively()
    layout = layout_of(model)
    found = weight_gradients(BlockWalk(model, layout, batches), layout.linears, ahead=2)
    for batch in batches:
        ids = batch["input_ids"]
        # The labels come shifted, and the model shifts them again.
        (model(input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous()).loss / len(batches)).backward()
    for name, gradient in found.items():
        expected = model.get_submodule(name).weight.grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_windows_with_nothing_to_predict_are_refused(lively, batches):
    model = lively()
    layout = layout_of(model)
    short = [{name: values[:, :2] for name, values in batch.items()} for batch in batches]
    with pytest.raises(LowRankKitError, match=r"more than 2 tokens.*calibration.seq_len"):
        weight_gradients(BlockWalk(model, layout, short), layout.linears, ahead=2)


def test_gradients_that_are_not_finite_name_the_linear(lively, batches):
    model = lively()
    layout = layout_of(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(LowRankKitError, match=r"gradient of the loss in model\.layers\.0\.self_attn\.q_proj is not f"):
        weight_gradients(BlockWalk(model, layout, batches), layout.linears)
    assert all(parameter.grad is None for parameter in model.parameters())
