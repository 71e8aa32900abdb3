"""Calibrate and decompose a model once for every ratio: spectra in memory, projections on disk, block by block."""

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel

from lowrank_kit.cache.key import StatisticsKey, maker_of
from lowrank_kit.calibration.collect import calibration_key, reads_of, reduce_spans
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.methods.svd import TruncatedSVD, unpack
from lowrank_kit.models.layout import LinearRef, ModelLayout, layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.truncate import Projection
from lowrank_kit.truncation.base import Layer


class Decomposition:
    """Every matrix's projection: its spectra at hand, its vectors read from disk when asked for."""

    def __init__(
        self,
        method: TruncatedSVD,
        layout: ModelLayout,
        spans: Collection[int],
        store: CalibrationStore,
        gradients: CalibrationStore | None,
        keeps_alive: object,
    ) -> None:
        self._method, self._keeps_alive = method, keeps_alive
        self.gradients, self.store = gradients, store
        self.groups = [group for group in method.groups(layout) if _span_of(method, group[0]) in spans]
        kept = {name: _spectra(entry) for first in spans for name, entry in store.load(first).items()}
        self.candidates = [method.candidate(group, kept[group[0].name]) for group in self.groups]
        self._read: tuple[int, dict[str, Kept]] = (-1, {})

    def projection(self, name: str) -> Projection:
        """The projection of the group whose first linear this is; ask in execution order to read every file once."""
        first = _span_of(self._method, next(group[0] for group in self.groups if group[0].name == name))
        if self._read[0] != first:
            self._read = (first, self.store.load(first))
        return unpack(self._read[1][name])


def decompose(
    model: PreTrainedModel,
    method: TruncatedSVD,
    samples: CalibrationSamples,
    *,
    batch_size: int,
    cache: Path | None,
    blocks: Collection[int] | None = None,
    progress: Progress | None = None,
) -> Decomposition:
    """Decompose the targets of `method`; ratio, rule and ranks play no part in it.

    Args:
        model: the original model.
        method: the compressor.
        samples: calibration windows.
        batch_size: windows a batch.
        cache: folder of the content-keyed cache; None: a temporary one, gone with the `Decomposition`.
        blocks: decompose only in these spans of blocks, by their first; None: in all.
        progress: shows a bar a pass.

    Raises:
        ConfigError: fewer calibration tokens than a matrix's smaller side: its outputs would not be determined.
        LowRankKitError: weights or activations that are not finite.
    """
    layout = layout_of(model)
    refs, request = method.targets(layout), method.needs()
    method.check_tokens(layout, samples.tokens)
    root, keeps_alive = cache, None
    if root is None:
        keeps_alive = tempfile.TemporaryDirectory(prefix="lowrank_kit-")
        root = Path(keeps_alive.name)
    asked = {"statistics": asdict(request), "reduction": method.reduction_key()}
    makers = (type(method), type(method.truncation))
    key = calibration_key(model, layout, samples, batch_size, reads_of(request), asked, makers, refs)
    store = CalibrationStore(root, key)
    spans = sorted({_span_of(method, ref) for ref in refs if blocks is None or _span_of(method, ref) in blocks})
    gradients = _gradient_store(root, key, request)

    def reduce(statistics: Sequence[LayerStatistics]) -> dict[str, Kept]:
        by_name = {layer.ref.name: layer for layer in statistics}
        found = {}
        for group in method.truncation.members([layer.ref for layer in statistics]):
            try:
                found[group[0].name] = method.reduce([_layer(model, by_name[ref.name]) for ref in group])
            except ValueError as error:
                raise LowRankKitError(f"{group[0].name} cannot be decomposed: {error}") from error
        return found

    with store.missing(spans) as missing:
        for first, results in reduce_spans(
            model,
            layout,
            samples,
            refs,
            request,
            reduce,
            batch_size=batch_size,
            span=method.truncation.span,
            gradients=gradients,
            skip={_span_of(method, ref) for ref in refs} - missing,
            progress=progress,
        ):
            store.save(first, results)
    return Decomposition(method, layout, spans, store, gradients, keeps_alive)


def _span_of(method: TruncatedSVD, ref: LinearRef) -> int:
    return ref.block - ref.block % method.truncation.span


def _layer(model: PreTrainedModel, statistics: LayerStatistics) -> Layer:
    module: Any = model.get_submodule(statistics.ref.name)
    return Layer(weight_of(module), module.bias, statistics)


def _gradient_store(root: Path, key: StatisticsKey, request: StatisticsRequest) -> CalibrationStore | None:
    """Where gradient statistics of this calibration lie; all who ask for the same parts share them."""
    if request.gradient is None:
        return None
    parts = asdict(StatisticsRequest(gradient=request.gradient))
    return CalibrationStore(root, replace(key, request=parts, maker=maker_of()))


def _spectra(kept: Kept) -> Kept:
    return {name: tensor for name, tensor in kept.items() if name == "values" or name.startswith("spectrum_")}
