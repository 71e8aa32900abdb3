"""Gradients of the loss in some linears: backward passes over the calibration set, in bounded memory."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from jaxtyping import Float
from rich.progress import Progress

from lowrank_kit import distributed
from lowrank_kit.calibration.backward import backward
from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.gradient_collector import GradientCollector
from lowrank_kit.calibration.next_token_loss import (
    SummedLoss,
    check_predicted,
    next_token_loss,
    sampled_token_loss,
)
from lowrank_kit.calibration.statistics import GradientRequest, GradientStatistics
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.deferred import PreTrainedModel, Tensor
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.streamed import weights_of
from lowrank_kit.progress import Bar

STATISTICS_BYTES = 4 * 2**30
"""Statistics held at once; a model whose blocks need more takes several passes."""


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
    loss = next_token_loss if request.label_seed is None else partial(sampled_token_loss, seed=request.label_seed)
    walk = BlockWalk(model, layout, distributed.share(batches))
    # Of a streamed model, a block's statistics are whole before those of the next one begin.
    passes = [list(wanted)] if weights_of(model).is_streamed else list(_passes(wanted, request))
    bar = Bar(progress, "gradients", len(passes) * len(walk.batches))
    for blocks in passes:
        linears = [ref for block in blocks for ref in wanted[block]]
        collector = GradientCollector(model, linears, request, loss, opening)
        with walk.watching(writes=collector.writes):
            for block in backward(walk, collector.loss, min(blocks), bar.advance):
                if block in blocks:
                    yield block, collector.statistics(wanted[block])


def weight_gradients(
    walk: BlockWalk,
    refs: Collection[LinearRef],
    *,
    ahead: int = 1,
    loss: SummedLoss | None = None,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Float[Tensor, "out in"]]:
    """Return ``dL/dW`` by name in one backward pass, L the mean loss over all predicted tokens of all batches.

    Args:
        walk: of `[rows, tokens]` model inputs with attention masks; padded positions are not counted. The model is in
            evaluation mode meanwhile, and left as it was found.
        refs: the linears wanted; gradients are held for these only.
        ahead: which token is predicted; 1: the next one.
        loss: another loss than that of the token ``ahead``.
        on_batch: called after every batch.

    Raises:
        LowRankKitError: a model without next-token head, nothing to predict, or gradients that are not finite.
    """
    if loss is None:
        check_predicted(walk.batches, ahead)
        loss = partial(next_token_loss, ahead=ahead)
    collector = GradientCollector(walk.model, refs, GradientRequest(mean=True), loss)
    with walk.watching(writes=collector.writes):
        for _ in backward(walk, collector.loss, min(ref.block for ref in refs), on_batch):
            pass
    return {name: found.mean for name, found in collector.statistics(refs).items() if found.mean is not None}


def bytes_of(refs: Iterable[LinearRef], request: GradientRequest) -> int:
    """What the statistics of some linears take, all at once; the small ones are not counted."""
    return sum(8 * request.moments * ref.full_rank**2 + 4 * request.mean * ref.parameters for ref in refs)


def _passes(wanted: Mapping[int, Sequence[LinearRef]], request: GradientRequest) -> Iterator[list[int]]:
    """Group the blocks so that no group's statistics exceed the limit; a block alone may."""
    group: list[int] = []
    held = 0
    for block, refs in wanted.items():
        size = bytes_of(refs, request)
        if group and held + size > STATISTICS_BYTES:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group
