"""The roles of linears that the architectures here share. A family with others of its own makes them in its file."""

from lowrank_kit.models.architectures.base import Group, Role

Q = Role("q", "attention", "query")
K = Role("k", "attention", "key")
V = Role("v", "attention", "value")
QKV = Role("qkv", "attention", "fused")
O = Role("o", "attention", "residual")  # noqa: E741
GATE = Role("gate", "mlp", "gate")
UP = Role("up", "mlp", "hidden")
GATE_UP = Role("gate_up", "mlp", "fused")
DOWN = Role("down", "mlp", "residual")


def attention(norm: str | None) -> tuple[Group, ...]:
    """Self-attention as Llama's modules call it, behind this norm."""
    readers = Group({Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}, norm=norm)
    return readers, Group({O: "self_attn.o_proj"})


ATTENTION = attention("input_layernorm")
"""Self-attention of Llama's blocks."""


def gated_mlp(norm: str | None) -> tuple[Group, ...]:
    """A gated MLP as Llama's modules call it, behind this norm."""
    return Group({GATE: "mlp.gate_proj", UP: "mlp.up_proj"}, norm=norm), Group({DOWN: "mlp.down_proj"})
