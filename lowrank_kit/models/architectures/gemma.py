"""Gemma: Llama's linears; from the second on with norms behind attention and MLP too. Texts begin with BOS."""

from dataclasses import replace

from lowrank_kit.models.architectures.base import Architecture, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, gated_mlp

_GEMMA = Architecture(
    (Stack("layers", ATTENTION + gated_mlp("post_attention_layernorm")),),
    "embed_tokens",
    "norm",
    heads_follow_width=True,
    starts_with_bos=True,
)
_BLOCK = ATTENTION + gated_mlp("pre_feedforward_layernorm")

register(_GEMMA, "gemma")
register(replace(_GEMMA, stacks=(Stack("layers", _BLOCK),)), "gemma2", "gemma3_text")
register(
    replace(
        _GEMMA,
        stacks=(Stack("language_model.layers", _BLOCK),),
        embedding="language_model.embed_tokens",
        final_norm="language_model.norm",
    ),
    "gemma3",
)
