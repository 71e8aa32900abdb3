"""StableLM: Llama's linears behind layer norms."""

from lowrank_kit.models.architectures import Architecture, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, gated_mlp

register(
    Architecture(
        (Stack("layers", ATTENTION + gated_mlp("post_attention_layernorm")),),
        embedding="embed_tokens",
        final_norm="norm",
    ),
    "stablelm",
)
