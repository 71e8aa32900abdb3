"""Calibrate and decompose a model once for every ratio: spectra in memory, projections on disk, block by block."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Float64

from lowrank_kit.cache.key import StatisticsKey, maker_of
from lowrank_kit.calibration.collect import calibration_key, reads_of, reduce_spans
from lowrank_kit.calibration.statistics import GradientRequest, Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.units import Units
from lowrank_kit.spectral.eliminate import Elimination, compensated, eliminate
from lowrank_kit.spectral.rounding import Rounding, rounding_losses
from lowrank_kit.spectral.truncate import Projection
from lowrank_kit.truncations.spectra import Spectrum
from lowrank_kit.truncations.truncation import Layer, Truncation, groups_of, warn_of_few_tokens

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What to decompose: by which truncation, with which spectra beside its own, and which linears of the model."""

    truncation: Truncation
    spectra: frozenset[Spectrum]
    refs: tuple[LinearRef, ...]
    units: tuple[Units, ...] = ()
    """MLPs whose channels are eliminated one by one."""
    roundings: tuple[Rounding, ...] = ()
    """What weights may be rounded to."""

    @property
    def extra(self) -> list[Spectrum]:
        """The spectra that the truncation's own values are not, by name."""
        return sorted((s for s in self.spectra if s.name != self.truncation.spectrum), key=lambda s: s.name)

    def needs(self) -> StatisticsRequest:
        """What the truncation and the spectra need."""
        requests = [self.truncation.needs(), *(spectrum.needs() for spectrum in self.extra)]
        gradients = [r.gradient for r in requests if r.gradient is not None]
        gradient = reduce(GradientRequest.together_with, gradients) if gradients else None
        if self.roundings and gradient is not None and gradient.moments:
            gradient = replace(gradient, diagonal=True)
        # Channels are inputs, and rounding sees them one by one, whichever side is the smaller one.
        inputs = self.units or self.roundings
        return StatisticsRequest(
            moments="input" if inputs else next((r.moments for r in requests if r.moments is not None), None),
            magnitudes=any(r.magnitudes for r in requests),
            gradient=gradient,
        )

    def decomposed(self, layers: Sequence[Layer]) -> Kept:
        """The projection of one group of linears and its spectra, as named tensors."""
        projection = self.truncation.project(layers)
        spectra = {f"spectrum_{spectrum.name}": spectrum.of(projection, layers) for spectrum in self.extra}
        return pack(projection) | spectra | self._rounded(projection, layers)

    def _rounded(self, projection: Projection, layers: Sequence[Layer]) -> Kept:
        """What each rounding adds to the loss."""
        if not self.roundings:
            return {}
        [layer] = layers
        metric, weight = self.truncation.diagonals(layer), layer.weight
        return {
            f"rounding_{rounding.bits}": rounding_losses(projection, weight, metric, rounding, weight.dtype)
            for rounding in self.roundings
        }

    def eliminated(self, layer: Layer) -> Kept:
        """The elimination of the channels that this linear reads, and their second moments in float32."""
        inputs, metric = self.truncation.seen_by_inputs(layer)
        found = eliminate(inputs, metric)
        return {"order": found.order, "losses": found.losses, "inputs": inputs.float()}

    def span_of(self, ref: LinearRef) -> int:
        """The first block of those that are decomposed together with this linear's."""
        return ref.block - ref.block % self.truncation.span

    @property
    def spans(self) -> dict[int, list[int]]:
        """The blocks that are decomposed together, by the first of them, in execution order."""
        spans: dict[int, list[int]] = {}
        for block, first in sorted({(ref.block, self.span_of(ref)) for ref in self.refs}):
            spans.setdefault(first, []).append(block)
        return spans


@dataclass
class Decomposition:
    """Every matrix's projection: its spectra at hand, its vectors read from disk when asked for.

    ``starved`` are matrices of experts that saw fewer tokens than they have directions: how many. They have none.
    ``eliminations`` are of the channels of the request's MLPs, by the units' name.
    """

    request: Request
    spans: Collection[int]
    store: CalibrationStore
    gradients: CalibrationStore | None
    """Gradient statistics of the original model, where the truncation or a spectrum reads them."""

    def __post_init__(self) -> None:
        request = self.request
        self.values: dict[str, Tensor] = {}
        self.spectra: dict[str, Mapping[str, Tensor]] = {}
        self.roundings: dict[str, dict[int, Tensor]] = {}
        self.starved: dict[str, int] = {}
        self.eliminations: dict[str, Elimination] = {}
        for first in self.spans:
            for name, kept in self.store.load(first).items():
                if "tokens" in kept:
                    self.starved[name] = int(kept["tokens"])
                    continue
                # Copies: whatever is kept of a mapped file holds all of it that was read.
                if "order" in kept:
                    self.eliminations[name] = Elimination(kept["order"].clone(), kept["losses"].clone())
                    continue
                values = kept["values"].clone()
                found = {s.name: kept[f"spectrum_{s.name}"].clone() for s in request.extra}
                own = {} if request.truncation.spectrum is None else {request.truncation.spectrum: values}
                self.values[name], self.spectra[name] = values, found | own
                self.roundings[name] = {r.bits: kept[f"rounding_{r.bits}"].clone() for r in request.roundings}
        wanted = groups_of(request.truncation, request.refs)
        self.groups = [group for group in wanted if group[0].name in self.values]

    def projection(self, name: str) -> Projection:
        """The projection of the group whose first linear this is."""
        first = self.request.span_of(next(group[0] for group in self.groups if group[0].name == name))
        return unpack(self.store.load(first)[name])

    def narrowed(self, units: Units, weight: Float[Tensor, "out n"], kept: Sequence[int]) -> Float64[Tensor, "out k"]:
        """The weight that reads the kept channels of an MLP and makes up for the others, in float64."""
        inputs = self.store.load(self.request.span_of(units.columns[0]))[units.name]["inputs"]
        return compensated(weight, inputs.to(weight.device), kept)


def decompose(
    model: "PreTrainedModel",
    request: Request,
    samples: CalibrationSamples,
    *,
    cache: Path,
    blocks: Collection[int] | None = None,
    progress: "Progress | None" = None,
) -> Decomposition:
    """Decompose the linears of a request; ratio, rule and ranks play no part in it.

    Args:
        model: the original model.
        request: what to decompose.
        samples: calibration windows.
        cache: folder of the content-keyed cache.
        blocks: decompose only in these spans of blocks, by their first; None: in all.
        progress: shows a bar a pass.

    Raises:
        LowRankKitError: weights or activations that are not finite.
    """
    needed, truncation = request.needs(), request.truncation
    warn_of_few_tokens(needed, request.refs, samples.tokens)
    reduction: dict[str, object] = {
        "truncation": truncation.model_dump(mode="json"),
        "spectra": [s.name for s in request.extra],
    }
    if request.units:
        reduction["units"] = [units.name for units in request.units]
    if request.roundings:
        reduction["roundings"] = [asdict(rounding) for rounding in request.roundings]
    asked = {"statistics": asdict(needed), "reduction": reduction}
    makers: list[type] = [Request, type(truncation), *(type(spectrum) for spectrum in request.extra)]
    key = calibration_key(model, samples, reads_of(needed), asked, makers, request.refs)
    store = CalibrationStore(cache, key)
    spans = [first for first in request.spans if blocks is None or first in blocks]
    gradients = _gradient_store(cache, key, needed)
    readers = {units.columns[0].name: units for units in request.units}

    def reduce_span(statistics: list[LayerStatistics]) -> dict[str, Kept]:
        groups = truncation.members([layer.ref for layer in statistics])
        by_name = {layer.ref.name: layer for layer in statistics}
        # From here on moments last as long as a linear that they belong to has to be decomposed.
        statistics.clear()
        found = {}
        for group in groups:
            members = [by_name.pop(ref.name) for ref in group]
            if needed.reads_activations and (seen := _starved(members[0])) is not None:
                found[group[0].name] = {"tokens": torch.tensor(seen)}
                continue
            try:
                found[group[0].name] = request.decomposed([_layer(model, layer) for layer in members])
            except ValueError as error:
                raise LowRankKitError(f"{group[0].name} cannot be decomposed: {error}") from error
            if (units := readers.get(group[0].name)) is not None:
                found[units.name] = request.eliminated(_layer(model, members[0]))
        return found

    with store.missing(spans) as missing:
        for first, results in reduce_spans(
            model,
            samples,
            request.refs,
            needed,
            reduce_span,
            spans=[blocks for first, blocks in request.spans.items() if first in missing],
            gradients=gradients,
            progress=progress,
        ):
            store.save(first, results)
            # Else they would live on while the next span is decomposed.
            del results
    return Decomposition(request, spans, store, gradients)


def pack(projection: Projection) -> Kept:
    """A projection as named tensors, its vectors in float32."""
    kept = {"values": projection.values, f"{projection.side}_expand": projection.expand.float()}
    if not torch.equal(projection.expand.T, projection.reduce):
        kept[f"{projection.side}_reduce"] = projection.reduce.float()
    return kept


def unpack(kept: Mapping[str, Tensor]) -> Projection:
    """The projection that `pack` made these tensors of."""
    side: Literal["output", "input"] = "output" if "output_expand" in kept else "input"
    expand = kept[f"{side}_expand"]
    return Projection(side, kept["values"], expand, kept.get(f"{side}_reduce", expand.T))


def _layer(model: "PreTrainedModel", statistics: LayerStatistics) -> Layer:
    module: Any = model.get_submodule(statistics.ref.name)
    return Layer(weight_of(module), module.bias, statistics)


def _starved(layer: LayerStatistics) -> int | None:
    """The number of tokens that an expert saw, if they do not determine its outputs."""
    enough = layer.ref.expert is None or layer.moments.count >= layer.ref.full_rank
    return None if enough else layer.moments.count


def _gradient_store(root: Path, key: StatisticsKey, request: StatisticsRequest) -> CalibrationStore | None:
    """Where gradient statistics of this calibration lie; all who ask for the same parts share them."""
    if request.gradient is None:
        return None
    parts = asdict(StatisticsRequest(gradient=request.gradient))
    return CalibrationStore(root, replace(key, request=parts, maker=maker_of()))
