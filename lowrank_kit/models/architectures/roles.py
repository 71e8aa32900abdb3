"""The roles of linears that the architectures here share. A family with others of its own makes them in its file."""

from lowrank_kit.models.architectures.architecture import Experts, Group, Role

Q = Role("q", "attention", "query")
K = Role("k", "attention", "key")
V = Role("v", "attention", "value")
QKV = Role("qkv", "attention", "fused")
O = Role("o", "attention", "residual")  # noqa: E741
GATE = Role("gate", "mlp", "gate")
UP = Role("up", "mlp", "hidden")
GATE_UP = Role("gate_up", "mlp", "fused")
DOWN = Role("down", "mlp", "residual")
SHARED_GATE = Role("shared_gate", "mlp", "gate")
SHARED_UP = Role("shared_up", "mlp", "hidden")
SHARED_DOWN = Role("shared_down", "mlp", "residual")
EXPERT_GATE = Role("expert_gate", "expert", "gate")
EXPERT_UP = Role("expert_up", "expert", "hidden")
EXPERT_DOWN = Role("expert_down", "expert", "residual")


def attention(norm: str | None) -> tuple[Group, ...]:
    """Self-attention as Llama's modules call it, behind this norm."""
    readers = Group({Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}, norm=norm)
    return readers, Group({O: "self_attn.o_proj"})


ATTENTION = attention("input_layernorm")
"""Self-attention of Llama's blocks."""


def gated_mlp(norm: str | None, path: str = "mlp") -> tuple[Group, ...]:
    """A gated MLP as Llama's modules call it, behind this norm."""
    return Group({GATE: f"{path}.gate_proj", UP: f"{path}.up_proj"}, norm=norm), Group({DOWN: f"{path}.down_proj"})


def shared_expert(norm: str | None, path: str) -> tuple[Group, ...]:
    """A gated MLP through which every token goes, beside the experts."""
    readers = Group({SHARED_GATE: f"{path}.gate_proj", SHARED_UP: f"{path}.up_proj"}, norm=norm)
    return readers, Group({SHARED_DOWN: f"{path}.down_proj"})


def experts(norm: str | None, path: str = "mlp.experts") -> Experts:
    """Experts behind this norm."""
    return Experts(path, EXPERT_GATE, EXPERT_UP, EXPERT_DOWN, norm=norm)
