"""From calibration samples to the batches that a model reads."""

from collections.abc import Mapping

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.deferred import PreTrainedModel, Tensor
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.memory import free_bytes, rows_that_fit

Batch = Mapping[str, Tensor]
"""Model inputs ``[rows, tokens]`` by name, with attention masks."""


def batches_of(model: PreTrainedModel, samples: CalibrationSamples) -> list[dict[str, Tensor]]:
    """Batches of at most ``samples.batch_size``, and of no more than memory is meant for (`rows_that_fit`).

    No statistic depends on how many there are in a batch. Raises `LowRankKitError` where the longest sample alone
    would not fit the memory that is free.
    """
    longest = max(len(sample["input_ids"]) for sample in samples.sequences)
    check_room(model, longest, free_bytes(model.device))
    rows = rows_that_fit(longest * _widest(model, longest), samples.batch_size)
    return samples.batches(rows, model.config.get_text_config().pad_token_id or 0)


def check_room(model: PreTrainedModel, tokens: int, free: int) -> None:
    """Raise `LowRankKitError` where a row of so many tokens needs more than ``free`` bytes.

    Counted are the hidden states of every block, what goes in and out of the linears of one block, and twice its
    largest tensor in float32.
    """
    layout, config = layout_of(model), model.config.get_text_config()
    linears = sum(ref.in_features + ref.out_features for ref in layout.linears) // len(layout.blocks)
    numbers = len(layout.blocks) * config.hidden_size + linears
    needed = tokens * (numbers * model.dtype.itemsize + 2 * 4 * _widest(model, tokens))
    if needed > free:
        raise LowRankKitError(
            f"a calibration window of {tokens} tokens needs about {needed / 2**30:.1f} GiB beside the model, and "
            f"{free / 2**30:.1f} GiB are free: lower calibration.seq_len to {max(1, tokens * free // needed)} or less"
        )


def _widest(model: PreTrainedModel, tokens: int) -> int:
    """Numbers a token in the largest tensor between the first block and the last."""
    config = model.config.get_text_config()
    widths = [max(ref.in_features, ref.out_features) for ref in layout_of(model).linears]
    # Other implementations do not hold the scores of all pairs of tokens.
    scores = config.num_attention_heads * tokens if config._attn_implementation == "eager" else 0
    return max(*widths, scores)
