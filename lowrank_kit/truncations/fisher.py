"""FWSVD: inputs weighted by their Fisher information."""

from collections.abc import Sequence
from typing import Literal

from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.spectral.truncate import Projection, output_projection
from lowrank_kit.truncations.diagonal import bounded, diagonal_moments
from lowrank_kit.truncations.truncation import Layer, Truncation


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
        return output_projection(layer.weight, diagonal_moments(bounded(gradient.fisher.double())))
