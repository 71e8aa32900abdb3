"""What a truncation is: the metric in which a weight's low-rank approximation is best."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64

from lowrank_kit.calibration.statistics import LayerStatistics, StatisticsRequest
from lowrank_kit.config import Choice
from lowrank_kit.deferred import Tensor
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import Projection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A linear to decompose, and what calibration found of it."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    statistics: LayerStatistics


class Truncation(Choice):
    """A truncation's settings; their fields are the keys of ``conf/truncation/NAME.yaml``."""

    spectrum: ClassVar[str | None] = None
    """Name of the `Spectrum` that the `values` of its projections are, so that an allocation which reads it needs no
    decomposition more; None: of none."""

    of_loss: ClassVar[bool] = False
    """Its values estimate the change of the loss, so that they compare across matrices and with lost channels."""

    sees_rounding: ClassVar[bool] = False
    """It has `diagonals`, so that what rounding loses compares with its values."""

    @property
    def span(self) -> int:
        """Neighbouring blocks that are decomposed together."""
        return 1

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for settings that do not fit the model."""

    def members(self, refs: Sequence[LinearRef]) -> list[tuple[LinearRef, ...]]:
        """Group the linears of one span: each group gets one decomposition and one rank."""
        return [(ref,) for ref in refs]

    def needs(self) -> StatisticsRequest:
        """What calibration has to collect."""
        return StatisticsRequest()

    def project(self, layers: Sequence[Layer]) -> Projection:
        """Decompose one group of `members`, a single matrix except for a joint basis.

        The projection's `values` are in per-token units. Raises `ValueError` for non-finite entries.
        """
        raise NotImplementedError

    def seen_by_inputs(self, layer: Layer) -> tuple[Float64[Tensor, "in in"], Float64[Tensor, "in in"]]:
        """C, and the metric B of the outputs as the inputs see it, `W^T B W`. Needs the moments of all inputs."""
        raise NotImplementedError

    def diagonals(self, layer: Layer) -> tuple[Float64[Tensor, " out"], Float64[Tensor, " in"]]:
        """The diagonals of B and C.

        Needs the moments of all inputs, and `GradientRequest.diagonal` if it needs moments of gradients.
        """
        raise NotImplementedError


def groups_of(truncation: Truncation, refs: Sequence[LinearRef]) -> list[tuple[LinearRef, ...]]:
    """Linears with a joint basis together, in execution order."""
    spans: dict[int, list[LinearRef]] = defaultdict(list)
    for ref in refs:
        spans[ref.block // truncation.span].append(ref)
    return [group for found in spans.values() for group in truncation.members(found)]


def warn_of_few_tokens(request: StatisticsRequest, refs: Sequence[LinearRef], tokens: int) -> None:
    """Say where moments are over fewer tokens than a matrix's smaller side has directions.

    The truncation is best for these tokens all the same; of the directions that none of them has, it knows nothing.
    """
    largest = max(refs, key=lambda ref: ref.full_rank)
    if request.moments is not None and tokens < (side := largest.full_rank):
        log.warning(
            "%d calibration tokens have %d of the %d directions of %s at most, and what it makes of others counts "
            "as no loss: for a model to be used, calibration.samples times calibration.seq_len should be ten times %d",
            tokens, tokens, side, largest.name, side,
        )  # fmt: skip


def mean_inputs(layer: Layer) -> Moments:
    """The input moments divided by the number of tokens."""
    moments = layer.statistics.moments
    return Moments(moments.gram / moments.count, moments.total / moments.count, moments.count)


def mean_output_gram(layer: Layer) -> Float64[Tensor, "out out"]:
    """Mean of `W x x^T W^T` over the tokens, from the moments of either side."""
    moments = layer.statistics.moments
    if layer.statistics.side == "output":
        return (moments if layer.bias is None else moments.without_bias(layer.bias)).gram / moments.count
    weight = layer.weight.detach().double()
    return weight @ (moments.gram / moments.count) @ weight.T
