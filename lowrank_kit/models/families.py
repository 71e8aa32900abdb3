"""Where the linears of each model family are: data, one entry per ``config.model_type``.

A block is written as groups of ``{role: path in the block}``, in the order in which the block executes them;
the linears of one group read the same input tensor. Paths of stacks, embedding and final norm are relative to
the base model (``LlamaModel``, not ``LlamaForCausalLM``), those of heads to the whole model.
"""

from dataclasses import dataclass

Group = dict[str, str]

LOWRANK_PREFIX = "lowrank_"
"""Compressed models have a model type of their own: this, then the type of the model that was compressed."""


@dataclass(frozen=True)
class StackSpec:
    """A list of equal blocks: the path of its ``ModuleList``, and the groups of linears in each block."""

    blocks: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Family:
    """One architecture. ``heads``: modules on top of the base model, of which a given model has at most one.

    ``pooler``: a module of the base model above its blocks, which some checkpoints lack.
    """

    stacks: tuple[StackSpec, ...]
    embedding: str
    final_norm: str | None
    heads: tuple[str, ...] = ("lm_head", "score")
    pooler: str | None = None


_ATTENTION: tuple[Group, ...] = (
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.o_proj"},
)
_GATED_MLP: tuple[Group, ...] = (
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    {"down": "mlp.down_proj"},
)
_LLAMA = Family((StackSpec("layers", _ATTENTION + _GATED_MLP),), "embed_tokens", "norm")
_GEMMA3 = Family(
    (StackSpec("language_model.layers", _ATTENTION + _GATED_MLP),),
    "language_model.embed_tokens",
    "language_model.norm",
)
_PHI3 = Family(
    (
        StackSpec(
            "layers",
            (
                {"qkv": "self_attn.qkv_proj"},
                {"o": "self_attn.o_proj"},
                {"gate_up": "mlp.gate_up_proj"},
                {"down": "mlp.down_proj"},
            ),
        ),
    ),
    "embed_tokens",
    "norm",
)
_GPT2 = Family(
    (
        StackSpec(
            "h",
            ({"qkv": "attn.c_attn"}, {"o": "attn.c_proj"}, {"up": "mlp.c_fc"}, {"down": "mlp.c_proj"}),
        ),
    ),
    "wte",
    "ln_f",
)
_OPT = Family(
    (
        StackSpec(
            "decoder.layers",
            (
                {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
                {"o": "self_attn.out_proj"},
                {"up": "fc1"},
                {"down": "fc2"},
            ),
        ),
    ),
    "decoder.embed_tokens",
    "decoder.final_layer_norm",
)
_BERT = Family(
    (
        StackSpec(
            "encoder.layer",
            (
                {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
                {"o": "attention.output.dense"},
                {"up": "intermediate.dense"},
                {"down": "output.dense"},
            ),
        ),
    ),
    "embeddings.word_embeddings",
    None,
    heads=("classifier", "cls", "lm_head"),
    pooler="pooler",
)


def _t5(*feed_forward: Group) -> Family:
    def in_layer(path: str, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple({role: f"{path}.{name}" for role, name in group.items()} for group in groups)

    own = in_layer("layer.0.SelfAttention", ({"q": "q", "k": "k", "v": "v"}, {"o": "o"}))
    cross_groups: tuple[Group, ...] = ({"cross_q": "q"}, {"cross_k": "k", "cross_v": "v"}, {"cross_o": "o"})
    cross = in_layer("layer.1.EncDecAttention", cross_groups)
    encoder = own + in_layer("layer.1.DenseReluDense", feed_forward)
    decoder = own + cross + in_layer("layer.2.DenseReluDense", feed_forward)
    return Family(
        (StackSpec("encoder.block", encoder), StackSpec("decoder.block", decoder)),
        "shared",
        "decoder.final_layer_norm",
        heads=("lm_head", "classification_head"),
    )


SLICEABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks add to the residual stream what they compute of its RMS norm, and do nothing else to it."""

# A type with several variants (T5's feed-forward is gated or not) takes the first whose modules all exist.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "gemma2": (_LLAMA,),
    "gemma3_text": (_LLAMA,),
    "gemma3": (_GEMMA3,),
    "phi3": (_PHI3,),
    "gpt2": (_GPT2,),
    "opt": (_OPT,),
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "t5": (_t5({"up": "wi"}, {"down": "wo"}), _t5({"gate": "wi_0", "up": "wi_1"}, {"down": "wo"})),
}


def base_type(model_type: str) -> str:
    """The model type that the table knows: for a compressed model, that of the original."""
    return model_type.removeprefix(LOWRANK_PREFIX)
