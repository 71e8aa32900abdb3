"""Spectra that an allocation may ask for: each computes itself from a layer's statistics.

A spectrum has one value a component. Squared singular values are in descending order, per calibration token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64

from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.attribution import drop_change
from lowrank_kit.spectral.eigenpairs import eigenvalues
from lowrank_kit.spectral.truncate import Projection
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.truncation import Layer
from lowrank_kit.truncations.two_sided import TwoSided


@dataclass(frozen=True)
class Spectrum(ABC):
    """A quantity of every component of a matrix; an allocation finds it in `Candidate.spectra` under its name."""

    name: ClassVar[str]

    @abstractmethod
    def needs(self) -> StatisticsRequest:
        """What calibration has to collect."""

    @abstractmethod
    def of(self, projection: Projection, layers: Sequence[Layer]) -> Float64[Tensor, " _"]:
        """The spectrum of one group of linears, and of the ``projection`` that the truncation made of it."""


@dataclass(frozen=True)
class Weight(Spectrum):
    """Squared singular values of W."""

    name: ClassVar[str] = "weight"

    def needs(self) -> StatisticsRequest:
        """See `Spectrum`."""
        return StatisticsRequest()

    def of(self, projection: Projection, layers: Sequence[Layer]) -> Float64[Tensor, " _"]:
        """See `Spectrum`; the members of a joint basis are stacked."""
        stacked = torch.cat([layer.weight.detach().double() for layer in layers])
        return eigenvalues(stacked @ stacked.T if stacked.shape[0] <= stacked.shape[1] else stacked.T @ stacked)


@dataclass(frozen=True)
class Whitened(Spectrum):
    """Squared singular values of `W C^{1/2}`, C the mean of `x x^T` over tokens."""

    name: ClassVar[str] = "whitened"

    def needs(self) -> StatisticsRequest:
        """See `Spectrum`."""
        return Optimal().needs()

    def of(self, projection: Projection, layers: Sequence[Layer]) -> Float64[Tensor, " _"]:
        """See `Spectrum`; those of the members of a joint basis together."""
        return _together([Optimal().project([layer]).values for layer in layers])


@dataclass(frozen=True)
class TwoSidedSpectrum(Spectrum):
    """Squared singular values of `B^{1/2} W C^{1/2}`, B the mean of `g g^T` over tokens."""

    name: ClassVar[str] = "two_sided"

    def needs(self) -> StatisticsRequest:
        """See `Spectrum`."""
        return TwoSided().needs()

    def of(self, projection: Projection, layers: Sequence[Layer]) -> Float64[Tensor, " _"]:
        """See `Spectrum`; those of the members of a joint basis together."""
        return _together([TwoSided().project([layer]).values for layer in layers])


@dataclass(frozen=True)
class Change(Spectrum):
    """First-order change of the mean loss when a component of the truncation is dropped, signed, in nats a token.

    `-<G, W_k>` for the component W_k, G the gradient of the mean loss, in the order of the truncation's components.
    """

    name: ClassVar[str] = "change"

    def needs(self) -> StatisticsRequest:
        """See `Spectrum`."""
        return StatisticsRequest(gradient=GradientRequest(mean=True))

    def of(self, projection: Projection, layers: Sequence[Layer]) -> Float64[Tensor, " _"]:
        """See `Spectrum`; summed over the members of a joint basis."""
        changes = torch.zeros_like(projection.values)
        for layer in layers:
            gradient = layer.statistics.gradient
            assert gradient is not None
            assert gradient.mean is not None
            changes += drop_change(projection.components(layer.weight), gradient.mean.double())
        return changes


def _together(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).sort(descending=True).values
