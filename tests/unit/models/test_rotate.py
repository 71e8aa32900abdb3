import pytest
import torch
from torch import nn

from lowrank_kit.models.architectures import all_with
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model
from lowrank_kit.models.rotate import slice_ends, slice_layer, sliced_layers

SLICEABLE = tuple(all_with(lambda architecture: architecture.plain_residual))

IDS = torch.arange(3, 27).reshape(2, 12)


def trained_looking(model):
    """Norm weights that are no ones and biases that are no zeros."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def bases(count, hidden, width):
    draw = torch.Generator().manual_seed(2)
    return [
        torch.linalg.qr(torch.randn(hidden, hidden, generator=draw, dtype=torch.float64)).Q[:, :width]
        for _ in range(count)
    ]


def sliced(model, width):
    layout = layout_of(model)
    found = bases(2 * len(layout.blocks) + 1, model.config.hidden_size, width)
    for index in range(len(layout.blocks)):
        slice_layer(model, layout, index, *found[2 * index : 2 * index + 3])
    slice_ends(model, layout, found[0], found[-1])
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SLICEABLE)
@torch.no_grad()
def test_rotated_but_not_narrowed_the_model_is_the_original(tiny_model, family, tied):
    model = trained_looking(tiny_model(family, tie_word_embeddings=tied))
    expected = model(IDS).logits
    rotated = sliced(model, 32)(IDS).logits
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", SLICEABLE)
@torch.no_grad()
def test_narrowed_it_is_the_original_with_its_residual_stream_projected(tiny_model, family):
    model, width = trained_looking(tiny_model(family)), 20
    model.config.rms_norm_eps = 0.3
    for norm in (m for n, m in model.named_modules() if n.endswith("norm")):
        norm.variance_epsilon = 0.3
    spaces = iter([(q @ q.T).float() for q in bases(7, 32, width)])
    # Every norm reads the projection, and so does the residual around it.
    handles = []
    for layer in model.model.layers:
        projections = next(spaces), next(spaces)
        handles.append(layer.register_forward_pre_hook(lambda _, args, p=projections[0]: (args[0] @ p, *args[1:])))
        layer.forward = project_inside(layer, projections[1])
    last = next(spaces)
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] @ last,)))
    expected = model(IDS).logits
    for handle in handles:
        handle.remove()
    for layer in model.model.layers:
        del layer.forward
    found = sliced(model, width)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert model.model.embed_tokens.weight.shape == (64, width)


def project_inside(layer, projection):
    def forward(hidden, **kwargs):
        hidden = (hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]) @ projection
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


def test_a_sliced_model_trains_with_and_without_gradient_checkpointing(tiny_model):
    gradients = []
    for checkpointing in (False, True):
        model = sliced(trained_looking(tiny_model("llama")), 20).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[-1])
    for with_, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_, without)


def test_hidden_states_are_recorded_as_of_the_stock_model(tiny_model):
    model = sliced(trained_looking(tiny_model("llama")), 20)
    assert [h.shape[-1] for h in model(IDS, output_hidden_states=True).hidden_states] == [20] * 4
    assert sliced_layers(model) == [f"model.layers.{i}" for i in range(3)]
    assert isinstance(model.model.layers[0].mlp_shortcut, nn.Linear)


@pytest.mark.assets
@torch.no_grad()
def test_a_real_model_rotated_is_the_original(smollm2_path):
    model = load_model(ModelSource(str(smollm2_path)), "causal").model
    ids = torch.randint(100, 40000, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    rotated = sliced(model, model.config.hidden_size)(ids).logits
    assert float((rotated - expected).abs().max()) < 1e-5 * float(expected.abs().max())
