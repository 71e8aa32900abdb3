"""OLMo 2 and 3: attention and MLP read the residual stream itself; the norms are behind them, and over all heads."""

from lowrank_kit.models.architectures.architecture import Architecture, Stack, register
from lowrank_kit.models.architectures.roles import attention, gated_mlp

register(
    Architecture(
        (Stack("layers", attention(None) + gated_mlp(None)),),
        "embed_tokens",
        "norm",
        joining="normed",
    ),
    "olmo2",
    "olmo3",
)
