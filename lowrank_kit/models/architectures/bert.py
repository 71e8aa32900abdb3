"""BERT and RoBERTa: encoders whose norms follow the residual sums."""

from dataclasses import replace

from lowrank_kit.models.architectures.architecture import Architecture, Group, Stack, register
from lowrank_kit.models.architectures.roles import DOWN, UP, K, O, Q, V

_BERT = Architecture(
    (
        Stack(
            "encoder.layer",
            (
                Group({Q: "attention.self.query", K: "attention.self.key", V: "attention.self.value"}),
                Group({O: "attention.output.dense"}),
                Group({UP: "intermediate.dense"}),
                Group({DOWN: "output.dense"}),
            ),
        ),
    ),
    "embeddings.word_embeddings",
    None,
    heads=("classifier", "cls", "lm_head"),
    pooler="pooler",
    joining="normed",
)

register(_BERT, "bert")
register(replace(_BERT, positions_start="behind_padding"), "roberta")
