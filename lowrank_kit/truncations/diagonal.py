"""Metrics of the inputs that are diagonal."""

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.moments import Moments

SMALLEST_WEIGHT = 1e-6
"""A diagonal's entries are at least this share of its mean, so that it can be divided out again."""


def diagonal_moments(values: Float[Tensor, " in"]) -> Moments:
    """Moments with these second moments and no others, as of one token each."""
    return Moments(torch.diag(values.double()), torch.zeros_like(values, dtype=torch.float64), values.shape[0])


def bounded(diagonal: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """The diagonal, raised to `SMALLEST_WEIGHT` where it is smaller."""
    return diagonal.clamp(min=SMALLEST_WEIGHT * float(diagonal.mean()))
