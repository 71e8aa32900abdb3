"""Truncated SVD of the weight alone."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from lowrank_kit.deferred import torch
from lowrank_kit.spectral.truncate import Projection, output_projection
from lowrank_kit.truncations.diagonal import diagonal_moments
from lowrank_kit.truncations.truncation import Layer, Truncation


class Plain(Truncation):
    """Truncated SVD of W: optimal in the Frobenius norm (Eckart and Young)."""

    spectrum: ClassVar[str | None] = "weight"

    kind: Literal["plain"] = "plain"
    """Marks the truncation."""

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`, with C = I."""
        [layer] = layers
        ones = torch.ones(layer.weight.shape[1], device=layer.weight.device)
        return output_projection(layer.weight, diagonal_moments(ones))
