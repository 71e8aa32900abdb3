"""Mixtures of experts with Llama's attention: in all blocks, or in some, with an expert for all tokens or without."""

from lowrank_kit.models.architectures.architecture import Architecture, Experts, Group, OneOf, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, experts, gated_mlp, shared_expert

_NORM = "post_attention_layernorm"


def _mixture(routers: tuple[str, ...], *mlp: Group | Experts | OneOf) -> Architecture:
    return Architecture((Stack("layers", (*ATTENTION, *mlp), routers),), "embed_tokens", "norm")


register(_mixture(("mlp.gate",), experts(_NORM)), "mixtral", "olmoe")
register(_mixture(("mlp.router",), experts(_NORM)), "gpt_oss")
register(_mixture(("mlp.gate",), OneOf(((experts(_NORM),), gated_mlp(_NORM)))), "qwen3_moe")
register(
    _mixture(
        ("mlp.gate", "mlp.shared_expert_gate"),
        OneOf(((*shared_expert(_NORM, "mlp.shared_expert"), experts(_NORM)), gated_mlp(_NORM))),
    ),
    "qwen2_moe",
)
register(
    _mixture(
        ("feed_forward.router",),
        OneOf(
            (
                (experts(_NORM, "feed_forward.experts"), *shared_expert(_NORM, "feed_forward.shared_expert")),
                gated_mlp(_NORM, "feed_forward"),
            )
        ),
    ),
    "llama4_text",
)
