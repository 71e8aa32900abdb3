"""Llama and those built like it: separate q, k, v, and a gated MLP, each behind a norm."""

from dataclasses import replace

from lowrank_kit.models.architectures.architecture import Architecture, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, gated_mlp

_LLAMA = Architecture(
    (Stack("layers", ATTENTION + gated_mlp("post_attention_layernorm")),),
    embedding="embed_tokens",
    final_norm="norm",
    plain_residual=True,
    heads_follow_width=True,
)

register(_LLAMA, "llama", "mistral", "qwen2", "qwen3", "smollm3")
# Granite scales what its blocks add to the residual stream.
register(replace(_LLAMA, plain_residual=False, joining="scaled"), "granite")
