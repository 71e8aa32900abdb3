"""Cohere's Command models: attention and MLP stand side by side and read the output of one norm."""

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, GATE, UP, K, O, Q, V

_READERS = {
    Q: "self_attn.q_proj",
    K: "self_attn.k_proj",
    V: "self_attn.v_proj",
    GATE: "mlp.gate_proj",
    UP: "mlp.up_proj",
}
_BLOCK = (Group(_READERS, norm="input_layernorm"), Group({O: "self_attn.o_proj"}), Group({DOWN: "mlp.down_proj"}))

register(Architecture((Stack("layers", _BLOCK),), "embed_tokens", "norm", heads_follow_width=True), "cohere", "cohere2")
