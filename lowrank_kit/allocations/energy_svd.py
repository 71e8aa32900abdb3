"""Ranks by the effective rank and the total energy of the two-sided spectrum: this toolkit's own rule."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import modulated, proportional, share_out
from lowrank_kit.spectral.metrics import effective_rank, head_concentration
from lowrank_kit.truncations.spectra import Spectrum, TwoSidedSpectrum


class EnergySvd(Allocation):
    """``k0 ~ sqrt(R / (out + in)) E^energy``, then ``k = k0 exp(-strength z(tau))``; our own rule, from no paper.

    R is the effective rank of the singular values of ``B^{1/2} W C^{1/2}`` and E the sum of their squares, so the rule
    needs a BACKWARD pass over the calibration text. Attention and MLP share the budget in a fixed proportion. tau is
    the share of the k0 kept components beyond those that hold a share `eta` of their energy: how concentrated the
    kept spectrum is. z standardises tau inside a role in a range of depth, and each such cluster keeps what k0 gave
    it. All defaults were fitted to held-out calibration text of one model, SmolLM2-135M.
    """

    kind: Literal["energy_svd"] = "energy_svd"
    """Marks the rule."""
    energy: float = Field(default=0.65, ge=0)
    """Exponent of E; 0: the shape of the spectrum alone."""
    attention: float | None = Field(default=0.8, gt=0)
    """Kept fraction of the attention's linears relative to that of the MLP's; null: all compete for one budget."""
    eta: float = Field(default=0.9, gt=0, le=1)
    """Share of the kept energy that tau speaks of."""
    strength: float = -0.3
    """Factor on z; negative gives more ranks to a concentrated spectrum, 0 leaves k0 as it is."""
    depth_ranges: int = Field(default=3, ge=1)
    """Ranges of neighbouring blocks that clusters are made of."""

    def needs(self) -> frozenset[Spectrum]:
        """The two-sided spectrum."""
        return frozenset({TwoSidedSpectrum()})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        anchored = proportional(candidates, budget, self._anchors(candidates))
        if not self.strength:
            return anchored
        taus = [
            head_concentration(values := c.spectra["two_sided"].sqrt(), min(anchored[c.name], len(values)), self.eta)
            for c in candidates
        ]
        return modulated(candidates, budget, anchored, taus, self.strength, self.depth_ranges)

    def _anchors(self, candidates: Sequence[Candidate]) -> list[float]:
        """The parameters of k0, up to a factor."""
        spectra = [c.spectra["two_sided"] for c in candidates]
        anchors = [
            (effective_rank(s.sqrt()) * c.first_rank_cost) ** 0.5 * float(s.sum()) ** self.energy
            for c, s in zip(candidates, spectra, strict=True)
        ]
        if self.attention is None:
            return anchors
        attention = [c.kind == "attention" for c in candidates]
        shares = [c.dense_cost * (self.attention if a else 1.0) for c, a in zip(candidates, attention, strict=True)]
        return share_out(anchors, attention, shares)
