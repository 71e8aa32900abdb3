"""Truncation in the Kronecker-factored metric of the loss: inputs on one side, the loss's gradients on the other.

Published relatives: KFAC-SVD and IO-SVD. With C the mean of x x^T and B that of g g^T, g the gradient of the loss at
the layer's output, `||B^(1/2) (W - W') C^(1/2)||_F^2` estimates the second-order change of the loss; its tail sums
compare across matrices.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.spectral.truncate import (
    Projection,
    damped_root,
    input_projection,
    output_projection_from_gram,
)
from lowrank_kit.truncation.base import Layer, Truncation, mean_output_gram


class TwoSided(Truncation):
    """SVD of `B^(1/2) W C^(1/2)`, undone by the inverse root of the damped B."""

    kind: Literal["two_sided"] = "two_sided"
    """Marks the truncation."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of B, as a share of its mean diagonal entry."""

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        return StatisticsRequest(moments="smaller", gradient="moments")

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`; `values` are in nats per token, up to the factor of the Gauss-Newton estimate."""
        [layer] = layers
        gradient, moments = layer.statistics.gradient, layer.statistics.moments
        assert gradient is not None
        metric = gradient.gram.double() / gradient.tokens
        out_features, in_features = layer.weight.shape
        if out_features <= in_features:
            return output_projection_from_gram(mean_output_gram(layer), damped_root(metric, self.damping))
        weight = layer.weight.detach().double()
        damping = self.damping * gradient.energy / gradient.tokens / out_features
        return input_projection(moments.gram / moments.count, metric + damping * weight.T @ weight)
