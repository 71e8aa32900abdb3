"""A Llama-like model in rotated and narrower bases: the weights of SliceGPT (arXiv 2401.15024, sections 3.1 to 3.4).

The residual stream x of width d becomes ``c Q^T x`` of width d', with Q ``[d, d']`` orthonormal, another one before
every norm, and ``c = sqrt(d'/d)``: the norm divides by the root mean square of d' numbers where the original divided
by that of d, so with this factor the norm's output is right as it stands, its epsilon too.
"""

import math
from typing import Any

from jaxtyping import Float64

from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, no_grad, torch
from lowrank_kit.models.layout import ModelLayout


@no_grad
def slice_layer(
    model: PreTrainedModel,
    layout: ModelLayout,
    block: int,
    before: Float64[Tensor, "d width"],
    middle: Float64[Tensor, "d width"],
    after: Float64[Tensor, "d width"],
) -> None:
    """Rewrite a decoder layer, in place, for the bases of the residual stream before, inside and after it."""
    from lowrank_kit.models.portable import add_shortcuts

    layer: Any = model.get_submodule(layout.blocks[block])
    scale = math.sqrt(before.shape[1] / before.shape[0])
    norms: dict[str, Any] = {}
    for ref in (ref for ref in layout.linears if ref.block == block):
        linear: Any = model.get_submodule(ref.name)
        read, written = (before, middle) if ref.kind == "attention" else (middle, after)
        if ref.writes_residual:
            _rotate_outputs(linear, written * scale)
        else:
            assert ref.norm is not None
            norms[ref.norm] = model.get_submodule(ref.norm)
            _rotate_inputs(linear, norms[ref.norm].weight, read / scale)
    for norm in norms.values():
        _set(norm, "weight", torch.ones(before.shape[1]))
    add_shortcuts(layer)
    _set(layer.attention_shortcut, "weight", middle.T @ before)
    _set(layer.mlp_shortcut, "weight", after.T @ middle)


@no_grad
def slice_ends(
    model: PreTrainedModel,
    layout: ModelLayout,
    first: Float64[Tensor, "d width"],
    last: Float64[Tensor, "d width"],
) -> None:
    """Rewrite embedding, final norm and head, in place, for the first and the last basis; a tied head is untied."""
    assert layout.final_norm is not None
    width = first.shape[1]
    scale = math.sqrt(width / first.shape[0])
    embedding: Any
    head: Any
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    final_norm: Any = model.get_submodule(layout.final_norm)
    _rotate_inputs(head, final_norm.weight, last / scale)
    _set(embedding, "weight", embedding.weight.double() @ first * scale)
    embedding.embedding_dim = width
    _set(final_norm, "weight", torch.ones(width))
    model.config.head_dim = layout.head_dim
    model.config.hidden_size = width
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def sliced_layers(model: "nn.Module") -> list[str]:
    """Module paths of the decoder layers that have shortcuts, in order of definition."""
    from lowrank_kit.models.portable import SlicedLayer

    return [name for name, module in model.named_modules() if isinstance(module, SlicedLayer)]


def _rotate_inputs(linear: "nn.Linear", norm: Tensor, basis: Tensor) -> None:
    _set(linear, "weight", (linear.weight.double() * norm.double()) @ basis)
    linear.in_features = basis.shape[1]


def _rotate_outputs(linear: "nn.Linear", basis: Tensor) -> None:
    _set(linear, "weight", basis.T @ linear.weight.double())
    linear.out_features = basis.shape[1]
    if linear.bias is not None:
        _set(linear, "bias", basis.T @ linear.bias.double())


def _set(module: Any, name: str, values: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(values.to(old.device, old.dtype), requires_grad=old.requires_grad))
