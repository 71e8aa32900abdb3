"""What a calibration will take, said before it: one row goes the whole way first, and its time is scaled."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lowrank_kit import distributed
from lowrank_kit.calibration.backward import ACTIVATION_BYTES
from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.gradients import STATISTICS_BYTES, bytes_of, stream_gradients
from lowrank_kit.calibration.hidden import MEMORY_BYTES
from lowrank_kit.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.deferred import PreTrainedModel, torch
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.memory import free_bytes
from lowrank_kit.models.streamed import weights_of
from lowrank_kit.progress import clock

log = logging.getLogger(__name__)

LEAST_ROWS = 16
"""Of fewer rows, one is too large a share to be read twice."""
WORTH_SAYING = 20.0
"""Seconds."""


@dataclass(frozen=True)
class Work:
    """What is to be done: for every span of blocks, ``reduce`` reads statistics of ``refs``; see `reduce_spans`."""

    refs: Collection[LinearRef]
    request: StatisticsRequest
    reduce: Callable[[list[LayerStatistics]], Mapping[str, object]]
    spans: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Estimate:
    """Seconds that the work takes, and the most bytes of memory that the process will hold."""

    seconds: float
    peak_bytes: int


def say_estimate(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    work: Work,
    gradients: CalibrationStore | None,
) -> None:
    """Log what a calibration on these batches will take, if that is long.

    ``gradients`` may hold some gradient statistics already. Nothing is said of few rows, of work that several processes
    share, and of a model that is read block by block: there, one row takes as long as many.
    """
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < LEAST_ROWS or distributed.size() > 1 or weights_of(model).is_streamed:
        return
    blocks = {ref.block for ref in work.refs}
    known = gradients is not None and blocks <= gradients.finished_blocks()
    found = estimate(model, layout, batches, work, gradients_known=known)
    if found.seconds >= WORTH_SAYING:
        log.info(
            "calibration on %d rows: about %s and %.1f GB of memory, by the time of one row (%.1f GB are free now)",
            rows, clock(round(found.seconds)), found.peak_bytes / 1e9, free_bytes(model.device) / 1e9,
        )  # fmt: skip


def estimate(
    model: PreTrainedModel, layout: ModelLayout, batches: Sequence[Batch], work: Work, *, gradients_known: bool = False
) -> Estimate:
    """Measure one row and one span of blocks.

    The row's passes are scaled by the number of tokens, the reduction of the last span by the number of spans. The
    memory is what the process holds now, the hidden states, the statistics at hand, and the activations of a batch.
    """
    tokens, held_now = sum(batch["input_ids"].numel() for batch in batches), _held(model)
    row = {name: values[:1] for name, values in batches[0].items()}
    share, request = tokens / row["input_ids"].numel(), work.request
    last = [ref for ref in work.refs if ref.block in work.spans[-1]]
    started, gradients = _now(model), dict[str, GradientStatistics]()
    if request.gradient is not None:
        for _, found in stream_gradients(
            model, layout, [row], last if gradients_known else work.refs, request.gradient
        ):
            gradients |= {ref.name: found[ref.name] for ref in last if ref.name in found}
    if gradients_known:
        started = _now(model)
    waiting: list[LayerStatistics] = []
    for block, statistics in stream_statistics(model, layout, [row], request, work.refs):
        if block in work.spans[-1]:
            waiting += [replace(layer, gradient=gradients.get(layer.ref.name)) for layer in statistics]
    passed = _now(model)
    with torch.no_grad():
        work.reduce(waiting)
    reduced = _now(model)
    # Moments and the two sides of a projection in float64, of one span.
    at_hand = 8 * sum(ref.in_features**2 + ref.full_rank * (ref.in_features + ref.out_features) for ref in last)
    batch_tokens = batches[0]["input_ids"].numel() * model.dtype.itemsize
    widths = sum(ref.in_features + ref.out_features for ref in layout.linears)
    activations = batch_tokens * widths // len(layout.blocks)
    if request.gradient is not None and not gradients_known:
        at_hand = max(at_hand, min(STATISTICS_BYTES, bytes_of(work.refs, request.gradient)))
        activations = min(ACTIVATION_BYTES, batch_tokens * widths)
    states = min(MEMORY_BYTES, tokens * layout.linears[0].in_features * model.dtype.itemsize)
    seconds = share * (passed - started) + len(work.spans) * (reduced - passed)
    return Estimate(seconds, held_now + states + at_hand + activations)


def _held(model: PreTrainedModel) -> int:
    """Bytes that the process holds: on the GPU, if the model is there."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
