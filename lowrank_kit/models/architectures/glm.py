"""GLM-4: separate q, k, v, gate and up in one matrix; GLM-4-0414 has norms behind attention and MLP too."""

from dataclasses import replace

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, DOWN, GATE_UP

_MLP = Group({GATE_UP: "mlp.gate_up_proj"}, norm="post_attention_layernorm"), Group({DOWN: "mlp.down_proj"})
_GLM = Architecture((Stack("layers", ATTENTION + _MLP),), "embed_tokens", "norm")

register(_GLM, "glm")
register(replace(_GLM, joining="normed"), "glm4")
