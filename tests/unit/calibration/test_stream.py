import gc
from collections import defaultdict

import numpy as np
import pytest
import torch

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.eigenpairs import eigenvalues, output_eigenvalues

LENGTHS = (11, 5, 17, 1, 8, 13)


def random_samples(lengths=LENGTHS, seed=0, decoder=False, start=3, vocabulary=64):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(start, vocabulary, (length,), generator=generator)

    samples = [{"input_ids": tokens(n)} for n in lengths]
    if decoder:
        # Lengths that differ from the encoder's: a confusion of the two masks cannot go unnoticed.
        samples = [{**s, "decoder_input_ids": tokens(n)} for s, n in zip(samples, lengths[::-1], strict=True)]
    return CalibrationSamples(tuple(samples))


# An independent float64 reference: every sample alone, without padding, hooks on the plain model.
def activations(model, names, samples):
    seen = defaultdict(lambda: ([], []))

    def keep(name):
        def hook(_module, inputs, output):
            for rows, tensor in zip(seen[name], (inputs[0], output), strict=True):
                rows.append(tensor.detach().reshape(-1, tensor.shape[-1]).double().numpy())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        for sample in samples.sequences:
            model(**{name: values[None] for name, values in sample.items()})
    for handle in handles:
        handle.remove()
    return {name: tuple(np.concatenate(rows) for rows in pair) for name, pair in seen.items()}


def relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


MODELS = [
    *((family, "causal") for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text")),
    *((family, "causal") for family in ("phi3", "gpt2", "opt")),
    *((family, "classification") for family in ("llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "roberta", "t5")),
    ("bert", "base"),
    ("llama", "base"),
    ("t5", "seq2seq"),
    ("t5_gated", "seq2seq"),
]


def samples_for(model):
    samples = random_samples(decoder=model.config.is_encoder_decoder)
    if model.config.is_encoder_decoder and type(model).__name__.endswith("Classification"):
        # T5 classifies at the one end-of-sequence token, and reads its input shifted right.
        ended = [{"input_ids": torch.cat([s["input_ids"], torch.tensor([2])])} for s in samples.sequences]
        samples = CalibrationSamples(tuple(ended)).with_decoder_inputs(0)
    return samples


def streamed(model, samples, side, batch_size=4, **options):
    layout = layout_of(model)
    batches = samples.batches(batch_size, 0)
    request = StatisticsRequest(moments=side)
    found = {}
    for _, statistics in stream_statistics(model, layout, batches, request, layout.linears, **options):
        found.update({layer.ref.name: layer for layer in statistics})
    return found


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_streamed_moments_are_those_of_one_plain_pass(tiny_model, family, head):
    model = tiny_model(family, head)
    samples = samples_for(model)
    names = [ref.name for ref in layout_of(model).linears]
    expected = activations(model, names, samples)
    for index, side in enumerate(("input", "output")):
        found = streamed(model, samples, side)
        assert list(found) == names
        for name in names:
            rows = expected[name][index]
            moments = found[name].moments
            assert found[name].side == side
            assert moments.count == len(rows)
            assert relative(moments.gram, rows.T @ rows) < 2e-6, name
            assert np.abs(moments.total.numpy() - rows.sum(0)).max() < 2e-6 * np.abs(rows).sum(0).max(), name


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen2"])
def test_layers_whose_sliding_window_is_shorter_than_the_samples(tiny_model, family):
    window = {"sliding_window": 4}
    if family == "qwen2":
        window["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    model = tiny_model(family, **window)
    samples = random_samples()
    names = [ref.name for ref in layout_of(model).linears]
    expected = activations(model, names, samples)
    unlimited = activations(tiny_model(family), names, samples)
    found = streamed(model, samples, "input")
    assert max(relative(expected[n][0], unlimited[n][0]) for n in names) > 1e-3
    for name in names:
        assert relative(found[name].moments.gram, expected[name][0].T @ expected[name][0]) < 2e-6


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "base"), ("t5", "seq2seq")]
)
def test_the_smaller_side_gives_the_spectrum_of_the_outputs(tiny_model, family, head):
    model = tiny_model(family, head)
    samples = samples_for(model)
    smaller, outputs = streamed(model, samples, "smaller"), streamed(model, samples, "output")
    assert {layer.side for layer in smaller.values()} == {"input", "output"}
    for name, layer in smaller.items():
        full = eigenvalues(outputs[name].moments.gram)
        module = model.get_submodule(name)
        if layer.side == "input":
            spectrum = output_eigenvalues(weight_of(module), layer.moments, module.bias)
        else:
            spectrum = eigenvalues(layer.moments.gram)
        assert relative(spectrum, full[: len(spectrum)].numpy()) < 1e-6
        assert full[len(spectrum) :].sum() <= 1e-6 * full[0]


def test_linears_of_one_input_share_one_gram(tiny_model):
    found = streamed(tiny_model("llama"), random_samples(), "input")
    q, k, o = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q.moments is k.moments
    assert q.moments is not o.moments


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(tiny_model, training):
    model = tiny_model("bert", "base", hidden_dropout_prob=0.5).train(training)
    samples = random_samples()
    first, second = (streamed(model, samples, "input") for _ in range(2))
    assert all(torch.equal(first[n].moments.gram, second[n].moments.gram) for n in first)
    assert all(module.training == training for module in model.modules())


def test_nothing_is_left_on_the_model(tiny_model):
    model = tiny_model("t5", "seq2seq")
    streamed(model, samples_for(model), "output")
    assert_bare(model)


def test_an_exception_inside_a_block_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("llama").train()
    broken = model.model.layers[0].mlp.down_proj
    handle = broken.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        streamed(model, random_samples(), "input")
    handle.remove()
    assert_bare(model)
    assert model.training


def test_abandoning_the_stream_restores_the_mode(tiny_model):
    model = tiny_model("llama").train()
    layout = layout_of(model)
    stream = stream_statistics(
        model, layout, random_samples().batches(4, 0), StatisticsRequest(moments="input"), layout.linears
    )
    next(stream)
    stream.close()
    assert model.training
    assert_bare(model)


def assert_bare(model):
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_graph_is_built_under_trainable_parameters(tiny_model, checkpointing):
    model = tiny_model("llama")
    model.requires_grad_(True)
    if checkpointing:
        model.activation_checkpointing_enable()
    for layer in streamed(model, random_samples(), "output").values():
        assert layer.moments.gram.grad_fn is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hidden_states_kept_do_not_grow_with_depth(tiny_model):
    assert kept_bytes(tiny_model, 8) == kept_bytes(tiny_model, 3)


def kept_bytes(tiny_model, depth):
    model = tiny_model("mistral", num_hidden_layers=depth)
    layout = layout_of(model)
    gc.collect()
    before = {id(t) for t in tensors()}
    stream = stream_statistics(
        model, layout, random_samples().batches(2, 0), StatisticsRequest(moments="input"), layout.linears
    )
    next(stream)
    gc.collect()
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors() if id(t) not in before}
    stream.close()
    return sum(new.values())


def tensors():
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]


def test_skipped_and_unwanted_blocks_only_pass_on(tiny_model):
    model = tiny_model("llama")
    layout, samples = layout_of(model), random_samples()
    whole, part = streamed(model, samples, "input"), streamed(model, samples, "input", skip={0, 1})
    assert {layer.ref.block for layer in part.values()} == {2}
    assert all(torch.equal(part[n].moments.gram, whole[n].moments.gram) for n in part)
    batches = samples.batches(4, 0)
    wanted = [ref for ref in layout.linears if ref.block == 1]
    found = dict(stream_statistics(model, layout, batches, StatisticsRequest(moments="input"), wanted))
    assert list(found) == [1]


def test_activations_that_are_not_finite_name_the_layer(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(LowRankKitError, match=r"model\.layers\.1\.mlp\.up_proj"):
        streamed(model, random_samples(), "output")
