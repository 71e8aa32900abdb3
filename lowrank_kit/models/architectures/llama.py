"""Llama and those built like it: separate q, k, v, and a gated MLP."""

from lowrank_kit.models.architectures.base import Architecture, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, gated_mlp

register(
    Architecture(
        (Stack("layers", ATTENTION + gated_mlp("post_attention_layernorm")),),
        embedding="embed_tokens",
        final_norm="norm",
        plain_residual=True,
        heads_follow_width=True,
    ),
    *("llama", "mistral", "qwen2", "qwen3"),
)
