"""Phi-3 and Phi-4: q, k, v in one matrix, gate and up in another."""

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, GATE_UP, QKV, O

register(
    Architecture(
        (
            Stack(
                "layers",
                (
                    Group({QKV: "self_attn.qkv_proj"}, norm="input_layernorm"),
                    Group({O: "self_attn.o_proj"}),
                    Group({GATE_UP: "mlp.gate_up_proj"}, norm="post_attention_layernorm"),
                    Group({DOWN: "mlp.down_proj"}),
                ),
            ),
        ),
        "embed_tokens",
        "norm",
    ),
    "phi3",
)
