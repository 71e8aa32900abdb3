"""Truncations that look at the weight alone, or at a diagonal beside it."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import Projection, output_projection
from lowrank_kit.truncation.base import Layer, Truncation

SMALLEST_WEIGHT = 1e-6
"""A diagonal's entries are at least this share of its mean, so that it can be divided out again."""


class Plain(Truncation):
    """Truncated SVD of W: optimal in the Frobenius norm (Eckart and Young)."""

    kind: Literal["plain"] = "plain"
    """Marks the truncation."""

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`, with C = I."""
        [layer] = layers
        return output_projection(layer.weight, _identity(layer))


class Fisher(Truncation):
    """FWSVD (arXiv 2207.00112): every input of W, a column here, weighted by its Fisher information.

    The weight is the square root of the diagonal empirical Fisher information summed over the outputs. The paper's W
    is `[in, out]`, so that its rows are these columns; all public codes weight them. A sample of the paper's Fisher
    information is a calibration sequence: its summed loss is differentiated before the square is taken, and
    `calibration.batch_size` plays no part. Public codes square the gradient of a batch's mean loss instead.
    """

    kind: Literal["fisher"] = "fisher"
    """Marks the truncation."""

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        return StatisticsRequest(gradient=GradientRequest(fisher=True))

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`, with the inputs' Fisher information as a diagonal C."""
        [layer] = layers
        gradient = layer.statistics.gradient
        assert gradient is not None
        assert gradient.fisher is not None
        return output_projection(layer.weight, _diagonal(_bounded(gradient.fisher.double())))


class Scaled(Truncation):
    """ASVD (arXiv 2312.05821, section 3.2): columns scaled by the mean absolute activation to the power alpha."""

    kind: Literal["scaled"] = "scaled"
    """Marks the truncation."""
    alpha: float = Field(default=0.5, ge=0, le=2)
    """Exponent of the mean absolute activation."""

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        return StatisticsRequest(magnitudes=True)

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`, with a diagonal C."""
        [layer] = layers
        magnitudes = layer.statistics.magnitudes
        assert magnitudes is not None
        return output_projection(layer.weight, _diagonal(_bounded(magnitudes.double()) ** (2 * self.alpha)))


def _bounded(diagonal: Tensor) -> Tensor:
    return diagonal.clamp(min=SMALLEST_WEIGHT * float(diagonal.mean()))


def _identity(layer: Layer) -> Moments:
    return _diagonal(torch.ones(layer.weight.shape[1], device=layer.weight.device))


def _diagonal(values: Tensor) -> Moments:
    return Moments(torch.diag(values.double()), torch.zeros_like(values, dtype=torch.float64), values.shape[0])
