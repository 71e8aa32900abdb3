"""The optimal truncation of W for inputs whose second moment is shrunk towards a multiple of the identity."""

from typing import Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.deferred import torch
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import output_projection
from lowrank_kit.truncations.truncation import Truncation, mean_inputs


class Shrunk(Truncation):
    """`min tr (W - W') C (W - W')^T` with C = (1 - a) mean(x x^T) + a mean(x^2) I."""

    kind: Literal["shrunk"] = "shrunk"
    """Marks the truncation."""
    strength: float = Field(default=0.01, ge=0, le=1)
    """The a above: 0 is the optimal truncation, 1 plain SVD."""

    def needs(self):
        """The moments of all inputs."""
        return StatisticsRequest(moments="input")

    def project(self, layers):
        """See `Truncation`."""
        [layer] = layers
        inputs = mean_inputs(layer)
        identity = torch.eye(len(inputs.gram), dtype=inputs.gram.dtype) * inputs.gram.diagonal().mean()
        gram = torch.lerp(inputs.gram, identity, self.strength)
        return output_projection(layer.weight, Moments(gram, inputs.total, inputs.count))
