"""Decoder layers whose residuals pass a matrix."""

from functools import cache
from typing import Any

from torch import Tensor, nn


class SlicedLayer(nn.Module):
    """Goes before a stock pre-norm decoder layer: its residuals pass a matrix from one rotated basis to the next.

    SliceGPT, section 3.4 (arXiv 2401.15024). `add_shortcuts` makes one of a stock layer.
    """

    attention_shortcut: nn.Linear
    mlp_shortcut: nn.Linear
    mlp: nn.Module
    self_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """Map ``[rows, tokens, hidden]`` to the same shape, in the next layer's basis."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


@cache
def _sliced_class(stock: Any) -> Any:
    # Under the stock name, by which transformers knows what must not be split over devices.
    return type(stock.__name__, (SlicedLayer, stock), {"__module__": __name__})


def add_shortcuts(layer: Any) -> None:
    """Give a decoder layer of the Llama kind its two shortcuts, not yet filled, of the width of its norms."""
    layer.__class__ = _sliced_class(layer.__class__)
    weight = layer.input_layernorm.weight
    width, options = weight.shape[0], {"bias": False, "device": weight.device, "dtype": weight.dtype}
    layer.attention_shortcut = nn.Linear(width, width, **options)
    layer.mlp_shortcut = nn.Linear(width, width, **options)
