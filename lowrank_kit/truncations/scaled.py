"""ASVD: inputs scaled by their mean magnitude."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.spectral.truncate import Projection, output_projection
from lowrank_kit.truncations.diagonal import bounded, diagonal_moments
from lowrank_kit.truncations.truncation import Layer, Truncation


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
        return output_projection(layer.weight, diagonal_moments(bounded(magnitudes.double()) ** (2 * self.alpha)))
