"""T5: an encoder and a decoder, which also attends to the encoder; the feed-forward is gated or not."""

from lowrank_kit.models.architectures.architecture import Architecture, Group, OneOf, Role, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, GATE, UP, K, O, Q, V

CROSS_Q = Role("cross_q", "attention", "query")
CROSS_K = Role("cross_k", "attention", "key", of_source=True)
CROSS_V = Role("cross_v", "attention", "value", of_source=True)
CROSS_O = Role("cross_o", "attention", "residual")

_ATTENTION = (
    Group({role: f"layer.0.SelfAttention.{role.name}" for role in (Q, K, V)}, norm="layer.0.layer_norm"),
    Group({O: "layer.0.SelfAttention.o"}),
)
_CROSS = (
    Group({CROSS_Q: "layer.1.EncDecAttention.q"}, norm="layer.1.layer_norm"),
    Group({CROSS_K: "layer.1.EncDecAttention.k", CROSS_V: "layer.1.EncDecAttention.v"}),
    Group({CROSS_O: "layer.1.EncDecAttention.o"}),
)


def _feed_forward(layer: str) -> OneOf:
    inside = f"{layer}.DenseReluDense"
    down = Group({DOWN: f"{inside}.wo"})
    plain = Group({UP: f"{inside}.wi"}, norm=f"{layer}.layer_norm")
    gated = Group({GATE: f"{inside}.wi_0", UP: f"{inside}.wi_1"}, norm=f"{layer}.layer_norm")
    return OneOf(((plain, down), (gated, down)))


register(
    Architecture(
        (
            Stack("encoder.block", (*_ATTENTION, _feed_forward("layer.1"))),
            Stack("decoder.block", (*_ATTENTION, *_CROSS, _feed_forward("layer.2"))),
        ),
        "shared",
        "decoder.final_layer_norm",
        heads=("lm_head", "classification_head"),
    ),
    "t5",
)
