"""Gemma: Llama's linears; from the second on with norms behind attention and MLP too. Texts begin with BOS.

The fourth has layers that take keys and values, or values, from others, and a small input of its own for every layer.
"""

from dataclasses import replace

from lowrank_kit.models.architectures.architecture import Architecture, Group, OneOf, Role, Stack, register
from lowrank_kit.models.architectures.roles import ATTENTION, K, O, Q, V, gated_mlp

_GEMMA = Architecture(
    (Stack("layers", ATTENTION + gated_mlp("post_attention_layernorm")),),
    "embed_tokens",
    "norm",
    heads_follow_width=True,
    starts_with_bos=True,
)
_BLOCK = ATTENTION + gated_mlp("pre_feedforward_layernorm")

register(_GEMMA, "gemma")
_NORMED = replace(_GEMMA, stacks=(Stack("layers", _BLOCK),), joining="normed")

register(_NORMED, "gemma2", "gemma3_text")
register(
    replace(
        _NORMED,
        stacks=(Stack("language_model.layers", _BLOCK),),
        embedding="language_model.embed_tokens",
        final_norm="language_model.norm",
    ),
    "gemma3",
)

PER_LAYER_GATE = Role("per_layer_gate", "mlp", "hidden")
PER_LAYER_OUT = Role("per_layer_out", "mlp", "residual")

_ALL = {Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}
_READERS = OneOf(
    tuple((Group({role: _ALL[role] for role in roles}, norm="input_layernorm"),) for roles in ((Q, K, V), (Q, K), (Q,)))
)
_PER_LAYER = Group({PER_LAYER_GATE: "per_layer_input_gate"}), Group({PER_LAYER_OUT: "per_layer_projection"})
_FOURTH: tuple[Group | OneOf, ...] = (
    _READERS,
    Group({O: "self_attn.o_proj"}),
    *gated_mlp("pre_feedforward_layernorm"),
    OneOf((_PER_LAYER, ())),
)

register(
    replace(_NORMED, stacks=(Stack("layers", _FOURTH),), blocks_stand_alone=False, heads_follow_width=False),
    "gemma4_text",
)
