"""Calibrate a model for a method: stream the statistics, reduce each layer's at once, keep the results."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lowrank_kit.cache.key import Maker, StatisticsKey
from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.estimate import Work, say_estimate
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.statistics import GradientStatistics, Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.deferred import PreTrainedModel, Tensor, no_grad, torch
from lowrank_kit.models.fingerprint import Reads
from lowrank_kit.models.layout import LinearRef, ModelLayout, layout_of
from lowrank_kit.progress import Bar


@dataclass(frozen=True)
class Reduction:
    """What is kept of a linear: from which statistics, and how.

    Attributes:
        request: which statistics ``keep`` reads.
        keep: called once a linear, while no other block's moments are held; its tensors are moved to the CPU.
        maker: the class that ``keep`` belongs to, see `maker_of`; None: ``keep`` itself.
        depends_on: what the outcome depends on beside the statistics, JSON-serialisable.
    """

    request: StatisticsRequest
    keep: Callable[[LayerStatistics], Kept]
    maker: type | None = None
    depends_on: Mapping[str, Any] = field(default_factory=dict)


def calibrate(
    model: PreTrainedModel,
    samples: CalibrationSamples,
    refs: Collection[LinearRef],
    reduction: Reduction,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Kept]:
    """Return what ``reduction`` keeps of every linear in ``refs``, by the linear's name.

    Args:
        model: the model; without gradients, only its blocks and embeddings matter.
        samples: the calibration samples. An encoder-decoder model whose samples have no ``decoder_input_ids``
            reads its own input shifted right, as its sequence classifiers do.
        refs: the linears to calibrate.
        reduction: what to keep of them.
        cache: folder of the content-keyed cache; None keeps nothing on disk.
        progress: shows one bar over the blocks.
    """
    request, blocks = reduction.request, {ref.block for ref in refs}

    def keep(statistics: Sequence[LayerStatistics]) -> dict[str, Kept]:
        return {layer.ref.name: reduction.keep(layer) for layer in statistics}

    def reduced(wanted: Collection[int]) -> Iterator[tuple[int, dict[str, Kept]]]:
        spans = [(block,) for block in sorted(wanted)]
        yield from reduce_spans(model, samples, refs, request, keep, spans=spans, progress=progress)

    if cache is None:
        return {name: kept for _, results in reduced(blocks) for name, kept in results.items()}
    asked = {"statistics": asdict(request), "reduction": dict(reduction.depends_on)}
    makers = (reduction.maker or reduction.keep,)
    store = CalibrationStore(cache, calibration_key(model, samples, reads_of(request), asked, makers, refs))
    with store.missing(blocks) as missing:
        for block, results in reduced(missing):
            store.save(block, results)
    return {name: kept for block in sorted(blocks) for name, kept in store.load(block).items()}


def calibration_key(
    model: PreTrainedModel,
    samples: CalibrationSamples,
    reads: Reads,
    request: Mapping[str, Any],
    makers: Iterable[Maker] = (),
    refs: Iterable[LinearRef] = (),
) -> StatisticsKey:
    """The key of numbers that the model gives on calibration samples; see `StatisticsKey`. Reads every weight once."""
    return StatisticsKey.of(
        model,
        layout_of(model),
        reads=reads,
        text=samples.fingerprint(),
        batch_size=samples.batch_size,
        request=request,
        makers=makers,
        linears=(ref.name for ref in refs),
    )


def reads_of(request: StatisticsRequest) -> Reads:
    """What statistics are read from: gradients are those of the loss, all others are of the blocks."""
    return "blocks" if request.gradient is None else "loss"


def reduce_spans(
    model: PreTrainedModel,
    samples: CalibrationSamples,
    refs: Collection[LinearRef],
    request: StatisticsRequest,
    reduce: Callable[[list[LayerStatistics]], dict[str, Kept]],
    *,
    spans: Sequence[Sequence[int]],
    gradients: CalibrationStore | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, dict[str, Kept]]]:
    """Yield ``(first block, what reduce keeps)`` for every span of blocks, in execution order.

    Args:
        model, samples, refs, progress: as for `calibrate`.
        request: which statistics ``reduce`` reads.
        reduce: called once a span with the statistics of its linears, while no other span's are held; it may take
            them out of the list, which is the last to hold them.
        spans: neighbouring blocks that are reduced together, in execution order; other blocks are known already.
        gradients: where gradient statistics lie or are put; needed where ``request`` asks for them.
    """
    if model.config.is_encoder_decoder:
        samples = samples.with_decoder_inputs(model.config.decoder_start_token_id)
    blocks = {ref.block for ref in refs}
    known = blocks.difference(*spans)
    bar = Bar(progress, "calibrate", len(blocks), len(known))
    if not spans:
        return
    layout, batches = layout_of(model), batches_of(model, samples)
    say_estimate(model, layout, batches, Work(refs, request, reduce, spans), gradients)
    if request.gradient is not None:
        assert gradients is not None
        collect_gradients(model, layout, batches, refs, request, gradients, progress, samples.opening)
    waiting: list[LayerStatistics] = []
    for block, statistics in stream_statistics(model, layout, batches, request, refs, known, samples.opening):
        if request.gradient is not None and gradients is not None:
            found = load_gradients(gradients, block, model.device)
            statistics = [replace(layer, gradient=found.pop(layer.ref.name)) for layer in statistics]
        waiting += statistics
        del statistics
        members = next(members for members in spans if block in members)
        if block == members[-1]:
            yield members[0], _reduced(reduce, waiting)
            # Else these moments would live on while the next block's are summed.
            waiting = []
        bar.advance()


@no_grad
def _reduced(
    reduce: Callable[[list[LayerStatistics]], dict[str, Kept]], statistics: list[LayerStatistics]
) -> dict[str, Kept]:
    return {name: _on_cpu(kept) for name, kept in reduce(statistics).items()}


def collect_gradients(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Mapping[str, Tensor]],
    refs: Collection[LinearRef],
    request: StatisticsRequest,
    store: CalibrationStore,
    progress: Progress | None,
    opening: int,
) -> None:
    """Put the gradient statistics that a request asks for into ``store``, of those blocks that it lacks."""
    assert request.gradient is not None
    blocks = {ref.block for ref in refs}
    with store.missing(blocks) as missing:
        if not missing:
            return
        skip = blocks - missing
        parts = request.gradient
        passes = stream_gradients(model, layout, batches, refs, parts, skip, progress, opening)
        for block, found in passes:
            store.save(block, {name: _on_cpu(statistics.tensors()) for name, statistics in found.items()})


def load_gradients(
    store: CalibrationStore, block: int, device: "torch.device | str" = "cpu"
) -> dict[str, GradientStatistics]:
    """Read the gradient statistics of one block's linears back, by name."""
    found = store.load(block).items()
    return {
        name: GradientStatistics.from_tensors({part: tensor.to(device) for part, tensor in kept.items()})
        for name, kept in found
    }


def _on_cpu(kept: Kept) -> Kept:
    return {quantity: tensor.cpu() for quantity, tensor in kept.items()}
