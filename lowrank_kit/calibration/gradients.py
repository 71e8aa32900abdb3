"""Gradients of the loss in some linears: backward passes over the calibration set, in bounded memory."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from jaxtyping import Float
from rich.progress import Progress

from lowrank_kit import distributed
from lowrank_kit.calibration.backward import Batch, Loss, check_predicted, frozen, next_token_loss, recomputed
from lowrank_kit.calibration.gradient_collector import GradientCollector
from lowrank_kit.calibration.prefix import Prefix
from lowrank_kit.calibration.statistics import GradientRequest, GradientStatistics
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.models.layout import LinearRef, ModelLayout

STATISTICS_BYTES = 4 * 2**30
"""Statistics held at once; a model whose blocks need more takes several passes."""

ACTIVATION_BYTES = 2 * 2**30
"""Activations of a batch, about, that may wait for the backward pass; blocks for which this has no room recompute."""


def stream_gradients(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    refs: Collection[LinearRef],
    request: GradientRequest,
    skip: Collection[int] = (),
    progress: Progress | None = None,
    opening: int = 0,
) -> Iterator[tuple[int, dict[str, GradientStatistics]]]:
    """Yield `(block index, gradient statistics of its linears by name)` from the last block to the first.

    Blocks are visited as many at a time as fit `STATISTICS_BYTES`; those below build no graph.

    Args:
        model: a causal language model, in evaluation mode while the generator runs; left as it was found.
        layout: its layout.
        batches: `[rows, tokens]` model inputs with attention masks; padded positions are not counted. Of several
            processes each reads its `distributed.share`, and all get the statistics of all batches.
        refs: the linears wanted.
        request: which statistics.
        skip: block indices whose statistics are known already.
        progress: shows one bar over all batches.
        opening: tokens at the beginning of every row (BOS) at which the moments do not count; the gradients in the
            weights are of what these contribute, too.

    Raises:
        LowRankKitError: a model without next-token head, nothing to predict, or gradients that are not finite.
    """
    check_predicted(batches)
    wanted: dict[int, list[LinearRef]] = {}
    for ref in sorted(refs, key=lambda ref: -ref.block):
        if ref.block not in skip:
            wanted.setdefault(ref.block, []).append(ref)
    passes, batches = list(_passes(wanted, request)), distributed.share(batches)
    task = progress.add_task("gradients", total=len(passes) * len(batches)) if progress else None

    def advance() -> None:
        if progress and task is not None:
            progress.advance(task)

    for blocks in passes:
        linears = [ref for block in blocks for ref in wanted[block]]
        collector = _passed(model, layout, batches, linears, request, next_token_loss, None, advance, opening)
        collector.add_up()
        statistics = collector.statistics()
        for block in blocks:
            yield block, {ref.name: statistics.pop(ref.name) for ref in wanted[block]}


def weight_gradients(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    refs: Collection[LinearRef],
    *,
    ahead: int = 1,
    loss: Loss | None = None,
    prefix: Prefix | None = None,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Float[Tensor, "out in"]]:
    """Return ``dL/dW`` by name in one backward pass, L the mean loss over all predicted tokens of all batches.

    Args:
        model: in evaluation mode meanwhile; left as it was found.
        layout: its layout.
        batches: `[rows, tokens]` model inputs with attention masks; padded positions are not counted.
        refs: the linears wanted; gradients are held for these only.
        ahead: which token is predicted; 1: the next one.
        loss: another loss than that of the token ``ahead``.
        prefix: hidden states of the same batches, to begin the passes at.
        on_batch: called after every batch.

    Raises:
        LowRankKitError: a model without next-token head, nothing to predict, or gradients that are not finite.
    """
    if loss is None:
        check_predicted(batches, ahead)
        loss = partial(next_token_loss, ahead=ahead)
    collector = _passed(model, layout, batches, refs, GradientRequest(mean=True), loss, prefix, on_batch)
    return {name: found.mean for name, found in collector.statistics().items() if found.mean is not None}


def _passed(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    refs: Collection[LinearRef],
    request: GradientRequest,
    loss: Loss,
    prefix: Prefix | None,
    on_batch: Callable[[], object],
    opening: int = 0,
) -> GradientCollector:
    """Run every batch forwards and backwards once. What is below the lowest linear builds no graph."""
    lowest = min(ref.block for ref in refs)
    longest = max((batch["input_ids"].numel() for batch in batches), default=1)
    keeping = _blocks_that_fit(layout, longest, model.dtype)
    with frozen(model), ExitStack() as stack:
        collector = stack.enter_context(GradientCollector(model, refs, request, opening))
        stack.enter_context(recomputed(model, layout.blocks[lowest : max(lowest, len(layout.blocks) - keeping)]))
        for number, batch in enumerate(batches):
            with ExitStack() as start, torch.enable_grad():
                if prefix is not None:
                    start.enter_context(prefix.resumed(number, lowest, model.device))
                collector.read(model, {k: v.to(model.device) for k, v in batch.items()}, loss)
            on_batch()
    return collector


def _passes(wanted: Mapping[int, Sequence[LinearRef]], request: GradientRequest) -> Iterator[list[int]]:
    """Group the blocks so that no group's statistics exceed the limit; a block alone may."""
    group: list[int] = []
    held = 0
    for block, refs in wanted.items():
        grams, weights = 8 * request.moments, 4 * request.mean
        size = sum(grams * ref.full_rank**2 + weights * ref.in_features * ref.out_features for ref in refs)
        if group and held + size > STATISTICS_BYTES:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


def _blocks_that_fit(layout: ModelLayout, tokens: int, dtype: "torch.dtype") -> int:
    """What waits of a block is about as much as goes in and out of its linears."""
    width = sum(ref.in_features + ref.out_features for ref in layout.linears) / len(layout.blocks)
    return int(ACTIVATION_BYTES / (tokens * width * dtype.itemsize))
