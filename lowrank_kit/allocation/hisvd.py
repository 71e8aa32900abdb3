"""HiSVD, a RECONSTRUCTION: ranks by information capacity, refined by the redundancy of the tail (ACL 2026)."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import exp
from statistics import fmean, pstdev
from typing import Literal

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.allocation.base import Allocation, Budget, Candidate, Probe, Quantity
from lowrank_kit.allocation.budget import break_even_of, proportional, share_out
from lowrank_kit.deferred import Tensor
from lowrank_kit.spectral.metrics import decay_exponent, effective_rank, rank_density, tail_redundancy

ATTENTION = frozenset({"q", "k", "v", "o", "qkv"})


class HiSvd(Allocation):
    """Two stages: capacity-anchored ranks k0, then ``k = k0 exp(-strength z(tau))`` with tau the tail redundancy at k0.

    z standardises tau inside a cluster (a role in a range of depth), and each cluster keeps what stage 1 gave it.
    Public are the abstract ("Capacity-Anchored Baseline Allocation", "Redundancy-Aware Refinement" that penalises
    structural excess in the spectral tail) and a README ("rank-density-aware", "cluster-level sublayer
    redundancy"); no formula is. Everything below is this toolkit's reading, with defaults chosen on held-out
    calibration text of SmolLM2-135M. Two of them go beyond the public description: the effective rank alone says
    little about what a matrix needs, so the total energy of its spectrum enters the capacity (`energy`), and attention
    and MLP share the budget in a fixed proportion (`attention`). One contradicts it: redundancy rewarded
    (`strength` below 0) beats redundancy penalised.
    """

    kind: Literal["hisvd"] = "hisvd"
    """Marks the rule."""
    spectrum: Literal["whitened", "weight", "two_sided"] = "two_sided"
    """Which matrix's spectrum both stages read."""
    exponent: Literal[1, 2] = 1
    """2: squared singular values; 1: singular values."""
    capacity: Literal["sqrt_cost", "proportional", "density"] = "sqrt_cost"
    """k0 from the effective rank R: sqrt(R / (out + in)), R, or the uniform rank times (rho / mean rho)^alpha."""
    alpha: float = Field(default=1.0, ge=0)
    """Exponent of the rank density rho = R / min(out, in); read by `capacity: density` only."""
    energy: float = Field(default=0.65, ge=0)
    """k0 is multiplied by the sum of the squared singular values to this power; 0: the shape of the spectrum alone."""
    attention: float | None = Field(default=0.8, gt=0)
    """Kept fraction of the attention's linears relative to that of the MLP's; null: all compete for one budget."""
    redundancy: Literal["energy", "slope"] = "energy"
    """tau: the share of k0 beyond a share `eta` of the kept energy, or how fast the tail beyond k0 decays."""
    eta: float = Field(default=0.9, gt=0, le=1)
    """Share of the kept energy; read by `redundancy: energy` only."""
    strength: float = -0.3
    """Factor on z; negative rewards redundancy, 0 leaves stage 1 as it is."""
    depth_ranges: int = Field(default=3, ge=1)
    """Ranges of neighbouring blocks that clusters are made of."""

    def needs(self) -> frozenset[Quantity]:
        """The chosen spectrum."""
        return frozenset({self.spectrum})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        spectra = [c.spectra[self.spectrum] ** (self.exponent / 2) for c in candidates]
        anchored = proportional(candidates, budget, self._anchors(candidates, spectra))
        if not self.strength:
            return anchored
        return proportional(candidates, budget, self._refined(candidates, spectra, anchored))

    def _anchors(self, candidates: Sequence[Candidate], spectra: Sequence[Float64[Tensor, " _"]]) -> list[float]:
        """Stage 1: capacities times total energy, in proportion inside attention and MLP if these are kept apart."""
        energies = [float(c.spectra[self.spectrum].sum()) ** self.energy for c in candidates]
        anchors = [k * e for k, e in zip(self._capacities(candidates, spectra), energies, strict=True)]
        if self.attention is None:
            return anchors
        families = [c.role in ATTENTION for c in candidates]
        shares = [c.dense_cost * (self.attention if f else 1.0) for c, f in zip(candidates, families, strict=True)]
        return share_out(candidates, anchors, families, shares)

    def _capacities(self, candidates: Sequence[Candidate], spectra: Sequence[Float64[Tensor, " _"]]) -> list[float]:
        if self.capacity == "density":
            densities = [rank_density(s, *c.shape) for c, s in zip(candidates, spectra, strict=True)]
            mean = fmean(densities) or 1.0
            uniform = break_even_of(candidates)
            return [k * (rho / mean) ** self.alpha for k, rho in zip(uniform, densities, strict=True)]
        effective = [effective_rank(s) for s in spectra]
        if self.capacity == "proportional":
            return effective
        return [(r / c.cost_per_rank) ** 0.5 for c, r in zip(candidates, effective, strict=True)]

    def _refined(
        self,
        candidates: Sequence[Candidate],
        spectra: Sequence[Float64[Tensor, " _"]],
        anchored: dict[str, int],
    ) -> list[float]:
        taus = [self._redundancy(s, anchored[c.name]) for c, s in zip(candidates, spectra, strict=True)]
        depth = 1 + max(c.block for c in candidates)
        clusters = [(c.role, c.block * self.depth_ranges // depth) for c in candidates]
        costs = [c.cost(anchored[c.name]) for c in candidates]
        factors = [exp(-self.strength * z) for z in _standardised(taus, clusters)]
        weights = [cost / c.cost_per_rank * f for c, cost, f in zip(candidates, costs, factors, strict=True)]
        return share_out(candidates, weights, clusters, costs)

    def _redundancy(self, spectrum: Float64[Tensor, " _"], rank: int) -> float:
        if self.redundancy == "energy":
            return tail_redundancy(spectrum, min(rank, len(spectrum)), self.eta)
        positive = int((spectrum > 0).sum())
        # Two values are the least that have a slope.
        return -decay_exponent(spectrum, min(rank, positive - 2)) if positive > 1 else 0.0


def _standardised(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    inside: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        inside[group].append(value)
    moments = {group: (fmean(found), pstdev(found)) for group, found in inside.items()}
    return [
        (value - moments[group][0]) / moments[group][1] if moments[group][1] > 0 else 0.0
        for value, group in zip(values, groups, strict=True)
    ]
