"""The optimal activation-aware truncation: least error of the layer's outputs over the calibration tokens."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.spectral.truncate import Projection, output_projection, output_projection_from_gram
from lowrank_kit.truncations.truncation import Layer, Truncation, mean_inputs, mean_output_gram


class Optimal(Truncation):
    """`min ||(W - W') X||_F`, the objective of SVD-LLM (arXiv 2403.07378), solved without a Cholesky factor."""

    spectrum: ClassVar[str | None] = "whitened"

    kind: Literal["optimal"] = "optimal"
    """Marks the truncation."""

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        return StatisticsRequest(moments="smaller")

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`; `values` are mean squared errors per token."""
        [layer] = layers
        if layer.statistics.side == "input":
            return output_projection(layer.weight, mean_inputs(layer))
        return output_projection_from_gram(mean_output_gram(layer))
