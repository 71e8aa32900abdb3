"""Block-local refinement, against transformers' own hidden states and torch's own optimiser."""

import copy
from dataclasses import replace
from functools import partial
from math import cos, pi

import pytest
import torch

from lowrank_kit.compressors.compressor import Context
from lowrank_kit.corrections.finished import FinishedBlocks
from lowrank_kit.corrections.refine import Refine
from lowrank_kit.corrections.residual import Residual
from lowrank_kit.corrections.sequential import Sequential
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.factored import factored_linears
from lowrank_kit.models.layout import layout_of
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.truncations.two_sided import TwoSided

from .test_sequential import logits_of, run


def states_of(model, samples, behind):
    """Hidden states behind a block, by sample, as transformers gives them."""
    return [
        model(input_ids=s["input_ids"][None], output_hidden_states=True).hidden_states[behind]
        for s in samples.sequences
    ]


def metric_of(model, samples):
    """B of what block 0 gives, by torch's own gradients in transformers' own hidden states, and what is added to it."""
    total, count = torch.zeros(model.config.hidden_size, model.config.hidden_size), 0
    for sample in samples.sequences:
        output = model(input_ids=sample["input_ids"][None], output_hidden_states=True)
        state = output.hidden_states[1]
        losses = torch.nn.functional.cross_entropy(output.logits[0, :-1], sample["input_ids"][1:], reduction="sum")
        [gradient] = torch.autograd.grad(losses, state)
        total, count = total + gradient[0].T @ gradient[0], count + gradient.shape[1] - 1
    mean = total.diagonal().mean()
    return total / mean + 0.1 * torch.eye(len(total))


@pytest.mark.parametrize(
    ("weighting", "relative_steps"), [("none", False), ("relative", False), ("loss", False), ("none", True)]
)
def test_a_block_is_trained_to_the_original_block_s_outputs(weighting, relative_steps, tiny_model, samples, method):
    """AA-SVD, arXiv 2604.02119: AdamW on the mean squared error of a block's outputs, from the closed form on."""
    method = partial(method, truncation=TwoSided())
    passes, rate, numbers = 2, 1e-3, len(samples.sequences)
    samples = replace(samples, batch_size=1)
    original = tiny_model("llama")
    start, found = copy.deepcopy(original), copy.deepcopy(original)
    run(start, method(correction=Residual()), samples)
    refine = Refine(passes=passes, learning_rate=rate, held_out=0, weighting=weighting, relative_steps=relative_steps)
    run(found, method(correction=refine), samples)
    metric = metric_of(original, samples) if weighting == "loss" else torch.eye(original.config.hidden_size)
    # Block 0 reads the same in all of them.
    block = start.model.layers[0].requires_grad_()
    for _, layer in factored_linears(block):
        # Both factors take half of the singular values.
        u, s, vh = torch.linalg.svd(layer.dense_weight().double(), full_matrices=False)
        u, s, vh = u[:, : layer.rank], s[: layer.rank], vh[: layer.rank]
        layer.up.weight.data, layer.down.weight.data = (u * s.sqrt()).float(), (s.sqrt()[:, None] * vh).float()
    parameters = list(block.parameters())
    sizes = [float(p.square().mean().sqrt()) if relative_steps else 1.0 for p in parameters]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.01)
    with torch.no_grad():
        targets = states_of(original, samples, 1)
    steps = passes * numbers
    warm = -(-steps // 10)
    for step in range(steps):
        order = torch.randperm(numbers, generator=torch.Generator().manual_seed(step // numbers))
        sample = int(order[step % numbers])
        now = (step + 1) / warm if step < warm else 0.1 + 0.9 * (1 + cos(pi * (step - warm) / (steps - warm))) / 2
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * now * size
        optimizer.zero_grad()
        target = targets[sample].flatten(0, 1)
        error = states_of(start, samples, 1)[sample].flatten(0, 1) - target
        squares = (error @ metric * error).sum(1)
        if weighting != "none":
            squares = squares / target.square().mean(1)
        (squares.sum() / error.numel()).backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
    trained = found.model.layers[0]
    for name, layer in factored_linears(block):
        expected = layer.dense_weight()
        torch.testing.assert_close(trained.get_submodule(name).dense_weight(), expected, rtol=0, atol=1e-4)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        torch.testing.assert_close(trained.get_parameter(name), block.get_parameter(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_the_model_comes_closer_to_the_original(family, tiny_model, samples, method):
    original, errors = tiny_model(family), []
    for correction in (Residual(), Refine(passes=8, learning_rate=1e-3, held_out=0)):
        model = copy.deepcopy(original)
        run(model, method(correction=correction), samples)
        errors.append((logits_of(model, samples) - logits_of(original, samples)).norm())
    assert errors[1] < 0.95 * errors[0]


def test_what_gains_nothing_on_held_out_windows_is_left(tiny_model, samples, method):
    original, models = tiny_model("llama"), []
    for correction in (Sequential(), Refine(residual=False, learning_rate=10.0)):
        models.append(copy.deepcopy(original))
        run(models[-1], method(correction=correction), samples)
    torch.testing.assert_close(logits_of(models[1], samples), logits_of(models[0], samples), rtol=0, atol=1e-4)


@pytest.mark.parametrize("storage", [Factors(), Pivot()], ids=lambda storage: storage.kind)
def test_a_killed_run_goes_on_to_the_same_bytes(storage, tiny_model, samples, method, tmp_path, monkeypatch):
    original, settings = tiny_model("llama"), method(correction=Refine(passes=3, held_out=0), storage=storage)
    whole = copy.deepcopy(original)
    plan = run(whole, settings, samples)
    kept, begun = [], FinishedBlocks.begin

    def begin(self, index, state):
        begun(self, index, state)
        kept.append(index)
        # In every block, behind its first and its second pass.
        if kept.count(index) <= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FinishedBlocks, "begin", begin)
    kills = 0
    while True:
        model = copy.deepcopy(original)
        context = Context(model, layout_of(model), samples, tmp_path / "cache", unfinished=tmp_path / "unfinished")
        try:
            settings.apply(plan, settings.calibrate(context), context)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 2 * len(layout_of(original).blocks)
    assert sorted(kept) == [index for index in range(len(layout_of(original).blocks)) for _ in range(3)]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Blocks of another plan or other settings are not taken for these.
    other = method(correction=Refine(passes=3, held_out=0, learning_rate=1e-4), storage=storage)
    model = copy.deepcopy(original)
    monkeypatch.setattr(FinishedBlocks, "begin", begun)
    context = Context(model, layout_of(model), samples, tmp_path / "cache", unfinished=tmp_path / "unfinished")
    other.apply(plan, other.calibrate(context), context)
    assert any(not torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_trained_in_float32_and_given_back(tiny_model, samples, method):
    model = tiny_model("llama").bfloat16()
    before = {name: p.requires_grad for name, p in model.named_parameters() if "layernorm" in name}
    start = copy.deepcopy(model)
    run(start, method(correction=Residual()), samples)
    # So small a step that bfloat16 would lose each of them.
    run(model, method(correction=Refine(passes=8, learning_rate=1e-4, held_out=0)), samples)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before
    moved = [
        name
        for name, p in model.model.layers[0].named_parameters()
        if not torch.equal(p, start.model.layers[0].get_parameter(name))
    ]
    assert moved


def test_weights_by_the_loss_need_to_know_it(tiny_model, method):
    layout = layout_of(tiny_model("llama"))
    method(correction=Refine(weighting="loss"), truncation=TwoSided()).check(layout)
    with pytest.raises(ConfigError, match="truncation=optimal does not collect: truncation=two_sided"):
        method(correction=Refine(weighting="loss")).check(layout)
    with pytest.raises(ValueError, match="residual=true"):
        Refine(weighting="loss", residual=False)


def test_too_few_windows_to_hold_one_out_are_refused(tiny_model, samples, method):
    model = tiny_model("llama")
    together = replace(samples, batch_size=len(samples.sequences))
    with pytest.raises(ConfigError, match=r"method\.correction\.held_out=0"):
        run(model, method(correction=Refine()), together)
    # Before the work: nothing has been replaced.
    assert model.state_dict().keys() == tiny_model("llama").state_dict().keys()
