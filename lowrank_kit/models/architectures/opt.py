"""OPT. Its norms are before or behind attention and MLP, as the configuration says: none is named here."""

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, UP, K, O, Q, V

register(
    Architecture(
        (
            Stack(
                "decoder.layers",
                (
                    Group({Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}),
                    Group({O: "self_attn.out_proj"}),
                    Group({UP: "fc1"}),
                    Group({DOWN: "fc2"}),
                ),
            ),
        ),
        "decoder.embed_tokens",
        "decoder.final_layer_norm",
    ),
    "opt",
)
