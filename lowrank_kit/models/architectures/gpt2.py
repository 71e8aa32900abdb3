"""GPT-2: q, k, v in one matrix, kept transposed (Conv1D)."""

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, QKV, UP, O

register(
    Architecture(
        (
            Stack(
                "h",
                (
                    Group({QKV: "attn.c_attn"}, norm="ln_1"),
                    Group({O: "attn.c_proj"}),
                    Group({UP: "mlp.c_fc"}, norm="ln_2"),
                    Group({DOWN: "mlp.c_proj"}),
                ),
            ),
        ),
        "wte",
        "ln_f",
    ),
    "gpt2",
)
