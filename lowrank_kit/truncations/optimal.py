"""The optimal activation-aware truncation: least error of the layer's outputs over the calibration tokens."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Float64

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.truncate import Projection, output_projection, output_projection_from_gram
from lowrank_kit.truncations.truncation import Layer, Truncation, mean_inputs, mean_output_gram


class Optimal(Truncation):
    """`min ||(W - W') X||_F`, the objective of SVD-LLM (arXiv 2403.07378), solved without a Cholesky factor."""

    spectrum: ClassVar[str | None] = "whitened"
    sees_rounding: ClassVar[bool] = True

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

    def diagonals(self, layer: Layer) -> tuple[Float64[Tensor, " out"], Float64[Tensor, " in"]]:
        """As in `Truncation`; B is the identity."""
        inputs = mean_inputs(layer).gram.diagonal()
        return torch.ones(layer.weight.shape[0]).to(inputs), inputs
