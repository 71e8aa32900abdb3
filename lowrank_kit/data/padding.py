"""Batches of rows of unequal length: padded on the right, for every model and tokenizer.

On the right, a family with absolute positions gets those it was trained with, and a causal model never reads a
padding token. Which side the tokenizer pads on by itself is for what is generated from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowrank_kit.deferred import PretrainedConfig, PreTrainedTokenizerBase, Tensor, nn, torch
from lowrank_kit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BatchEncoding
else:
    BatchEncoding = Any

NOT_PREDICTED = -100
"""Label of a token that is not learnt: what torch's cross-entropy leaves out."""


def pad_right(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of rows, each a one-dimensional tensor by input name, with attention masks.

    ``labels`` may be without dimensions (a class, a score); else `NOT_PREDICTED` pads them.
    """
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if not values[0].ndim:
            batch[name] = torch.stack(values)
            continue
        padding = pad_token_id if name.endswith("input_ids") else NOT_PREDICTED if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        if name.endswith("input_ids"):
            mask = name.replace("input_ids", "attention_mask")
            batch[mask] = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in values], batch_first=True)
    return batch


@dataclass(frozen=True)
class RightPadded:
    """Collates encoded rows (lists of numbers by input name, and ``labels``) into a batch."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """The batch of these rows."""
        import transformers

        return transformers.BatchEncoding(
            pad_right([{n: torch.as_tensor(v) for n, v in row.items()} for row in rows], self.pad_token_id)
        )


def padding_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: Iterable[Sequence[int]] = ()) -> int:
    """The token that pads batches for a model.

    Attention masks hide padding, but for the heads of decoders, which read the last token that is not
    ``config.pad_token_id``. Where the model names that token, it pads. Where it does not, such a head reads a row alone
    at its last token, whatever it is: the tokenizer's padding token pads unless one of ``rows`` (token ids) ends in it,
    else a token that ends none of them.

    Raises `ConfigError` for a padding token beyond the embedding.
    """
    text = config.get_text_config()
    ids = {"tokenizer's padding token": tokenizer.pad_token_id, "model's pad_token_id": text.pad_token_id}
    for what, given in ids.items():
        if given is not None and not 0 <= given < text.vocab_size:
            token = f" '{tokenizer.pad_token}'" if given == tokenizer.pad_token_id else ""
            raise ConfigError(
                f"the {what}{token} has the id {given}, and the model's embedding has {text.vocab_size} rows (ids 0 to "
                f"{text.vocab_size - 1}): name a token that the model knows (pad_token in tokenizer_config.json, "
                f'for example "{tokenizer.eos_token or tokenizer.unk_token}"; pad_token_id in config.json), or save '
                "the model again after model.resize_token_embeddings(len(tokenizer))"
            )
    if text.pad_token_id is not None:
        return text.pad_token_id
    last = {ids[-1] for ids in rows if len(ids)}
    preferred = [tokenizer.pad_token_id, tokenizer.unk_token_id, *range(text.vocab_size)]
    return next(token for token in preferred if token is not None and token not in last)
