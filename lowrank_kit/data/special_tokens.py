"""What begins a text that a causal model reads: one rule for windows, instructions and lm-eval's prompts alike.

A text gets its BOS token here and no other special token: what a tokenizer puts behind a text (``add_eos_token``) would
end a prompt before its answer, or stand inside a text that goes on in the next window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowrank_kit.config import Bos
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import find


@dataclass(frozen=True)
class Opening:
    """The BOS token before every text, ``token`` with its ``id``; None twice: nothing."""

    choice: Bos
    token: str | None = None
    id: int | None = None

    def __len__(self) -> int:
        """Number of tokens: they are read, and neither predicted nor calibrated on."""
        return int(self.id is not None)

    def __str__(self) -> str:
        """As a table says it."""
        return "no BOS" if self.token is None else f"each begun with {self.token}"

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return [] if self.id is None else [self.id]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"choice": self.choice, "token": self.token, "id": self.id}

    def encode(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of every text behind BOS; one that is written out at a text's beginning is not put there twice."""
        return [ids if self.ids and ids[:1] == self.ids else self.ids + ids for ids in plain_ids(texts, tokenizer)]

    def windows(self, tokens: Int64[Tensor, " tokens"], length: int) -> Int64[Tensor, "windows length"]:
        """Cut a text into whole windows of ``length`` tokens, each behind BOS."""
        step = length - len(self)
        count = len(tokens) // step
        begun = torch.tensor(self.ids, dtype=tokens.dtype).expand(count, len(self))
        return torch.cat([begun, tokens[: count * step].view(count, step)], dim=1)


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of every text and nothing around them."""
    # Not verbose: a text longer than the model reads may be wanted.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def opening_of(
    choice: Bos, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig | None = None, key: str = "bos"
) -> Opening:
    """What begins every text.

    Args:
        choice: ``auto``: BOS where the tokenizer puts it there itself, and for a family that was trained with it, as
            lm-eval does for Gemma, whatever its tokenizer does. ``always`` and ``never`` ask for it.
        tokenizer: the model's.
        model: the model's configuration, which names its family; None: one that has no rule of its own.
        key: of the configuration, for the message.

    Raises `ConfigError` for ``always`` where the tokenizer has no BOS token.
    """
    put = put_before(tokenizer)
    token_id = tokenizer.bos_token_id if put is None else put
    architecture = None if model is None else find(model.model_type)
    wants_it = architecture is not None and architecture.starts_with_bos
    if choice == "always" and token_id is None:
        raise ConfigError(
            f"{key}=always: the tokenizer names no BOS token (bos_token in its tokenizer_config.json); use "
            f"{key}=auto or {key}=never"
        )
    if token_id is None or choice == "never" or not (choice == "always" or wants_it or put is not None):
        return Opening(choice)
    return Opening(choice, tokenizer.convert_ids_to_tokens(token_id), token_id)


def put_before(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before a text by itself, be it named as its BOS or not."""
    # Of nothing, so that a vocabulary without the word asked for is no obstacle.
    whole = tokenizer([""])["input_ids"][0]
    around = len(whole) - len(plain_ids([""], tokenizer)[0])
    if around == 1 and whole[0] == tokenizer.eos_token_id:
        # Before or behind? The token may be BOS, too.
        return whole[0] if whole[0] == tokenizer.bos_token_id != tokenizer(["a"])["input_ids"][0][-1] else None
    return whole[0] if around else None


def check_embedded(
    rows: Iterable[Iterable[int]], tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig | None, where: str
) -> None:
    """Raise `ConfigError` for token ids of ``where`` that a model has no embedding for."""
    if model is not None and (fault := beyond((max(ids, default=-1) for ids in rows), tokenizer, model)):
        raise ConfigError(f"{where}: {fault}")


def beyond(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig) -> str | None:
    """What is wrong with tokens that a model has no embedding for; None where it has one for each."""
    largest, rows = max(ids, default=-1), model.get_text_config().vocab_size
    if largest < rows:
        return None
    return (
        f"the token '{tokenizer.convert_ids_to_tokens(largest)}' has the id {largest}, and the model's embedding has "
        f"{rows} rows (ids 0 to {rows - 1}): use the tokenizer that belongs to the model, or save the model again "
        "after model.resize_token_embeddings(len(tokenizer))"
    )
