"""HiSVD, a RECONSTRUCTION: ranks by information capacity, less where the spectral tail is redundant (ACL 2026)."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import modulated, proportional
from lowrank_kit.deferred import Tensor
from lowrank_kit.spectral.metrics import (
    decay_exponent,
    effective_rank,
    rank_density,
    tail_participation,
    tail_redundancy,
)
from lowrank_kit.truncations.spectra import Spectrum, Whitened


class HiSvd(Allocation):
    """Two stages on the whitened spectrum: ``k0 ~ f(R)``, then ``k = k0 exp(-strength z(tau))`` with strength >= 0.

    R is the effective rank of the eigenvalues of ``W C W^T``, C the second moment of the inputs: a forward pass and no
    gradient. Stage 1 anchors ranks at this capacity. tau is the redundancy of the tail BEYOND k0; z standardises
    it inside a cluster (a role in a range of depth), and each cluster keeps the parameters that stage 1 gave it.
    Public are the abstract ("capacity-anchored" allocation, a refinement that "modulates this baseline using tail
    redundancy to penalize structural excess") and a README ("rank-density-aware", "cluster-level sublayer
    redundancy"). No formula is: everything else is this toolkit's reading, chosen on held-out calibration text of
    SmolLM2-135M and Qwen2.5-Coder-0.5B.
    """

    kind: Literal["hisvd"] = "hisvd"
    """Marks the rule."""
    capacity: Literal["density", "rank"] = "density"
    """f(R): `density` is the uniform rank times (R / min(out, in))^power, `rank` is R^power."""
    power: float = Field(default=0.1, ge=0)
    """Exponent of the capacity; `density` with 0 is the uniform rank."""
    redundancy: Literal["energy", "participation", "slope"] = "slope"
    """tau: 1 minus the share of the tail's components that hold `eta` of its energy; 1 minus its participation
    ratio over its length; or the exponent of its decay."""
    eta: float = Field(default=0.9, gt=0, le=1)
    """Share of the tail's energy that `redundancy: energy` speaks of."""
    strength: float = Field(default=0.1, ge=0)
    """Penalty on a redundant tail; 0 leaves stage 1 as it is."""
    depth_ranges: int = Field(default=3, ge=1)
    """Ranges of neighbouring blocks that clusters are made of."""

    def needs(self) -> frozenset[Spectrum]:
        """The whitened spectrum."""
        return frozenset({Whitened()})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        anchored = proportional(candidates, budget, self._anchors(candidates))
        if not self.strength:
            return anchored
        taus = [self._redundancy(c.spectra["whitened"], anchored[c.name]) for c in candidates]
        return modulated(candidates, budget, anchored, taus, self.strength, self.depth_ranges)

    def _anchors(self, candidates: Sequence[Candidate]) -> list[float]:
        """Stage 1: the parameters of k0, up to a factor."""
        spectra = [c.spectra["whitened"] for c in candidates]
        if self.capacity == "rank":
            return [
                effective_rank(s) ** self.power * c.first_rank_cost for c, s in zip(candidates, spectra, strict=True)
            ]
        return [
            c.dense_cost * rank_density(s, *c.shape) ** self.power for c, s in zip(candidates, spectra, strict=True)
        ]

    def _redundancy(self, spectrum: Float64[Tensor, " _"], rank: int) -> float:
        """Tau of one matrix cut at this rank; a tail without energy is all redundant."""
        if self.redundancy == "energy":
            return tail_redundancy(spectrum, rank, self.eta)
        if self.redundancy == "participation":
            return 1 - tail_participation(spectrum, rank)
        positive = int((spectrum > 0).sum())
        # Two values are the least that have a slope.
        return -decay_exponent(spectrum, min(rank, positive - 2)) if positive > 1 else 0.0
