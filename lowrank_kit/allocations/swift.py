"""Swift-SVD: inside a role, half of the budget evenly and half by importance and output size (arXiv 2604.01609)."""

from collections.abc import Sequence
from math import e, log
from typing import Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Budget, Candidate, MeasuredAllocation, Probe
from lowrank_kit.allocations.budget import keep_of, options_of, proportional, share_out
from lowrank_kit.truncations.spectra import Spectrum, Whitened


class Swift(MeasuredAllocation):
    """``k = floor * uniform + the rest in proportion to beta^alpha * log(e + eps)^(1 - alpha)``, role by role.

    eps is the norm of the matrix's output over the calibration tokens (all squared singular values of the whitened
    matrix, summed) and beta its block's importance, scaled to 1..2 over the blocks: the loss that is measured when
    that block alone is cut to the uniform rank. Checked against the authors' code, where beta is the block influence
    1 - cos(h, h') and, at the time of reading, the constant under the logarithm is 1 with e in a comment; e is the
    paper's. alpha is to be picked on validation text (their script: 0.6).
    """

    kind: Literal["swift"] = "swift"
    """Marks the rule."""
    alpha: float = Field(default=0.6, ge=0, le=1)
    """Weight of the block's importance against that of the output's size."""
    floor: float = Field(default=0.5, ge=0, le=1)
    """Share of the uniform rank that every matrix gets beforehand."""
    tokens: int = Field(default=524288, ge=1)
    """Tokens that eps sums over. The authors': 256 samples of 2048."""

    def needs(self) -> frozenset[Spectrum]:
        """The whitened spectrum."""
        return frozenset({Whitened()})

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        dense = [candidate.dense_cost for candidate in candidates]
        beta = self._importance(candidates, budget, probe)
        scores = [
            cost * beta[c.block] ** self.alpha * log(e + self._output_norm(c)) ** (1 - self.alpha)
            for cost, c in zip(dense, candidates, strict=True)
        ]
        shared = share_out(scores, [c.role for c in candidates], dense)
        weights = [self.floor * cost + (1 - self.floor) * share for cost, share in zip(dense, shared, strict=True)]
        return proportional(candidates, budget, weights)

    def _output_norm(self, candidate: Candidate) -> float:
        return float(self.tokens * candidate.spectra["whitened"].sum()) ** 0.5

    def _importance(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None) -> dict[int, float]:
        blocks: dict[int, list[Candidate]] = {}
        for candidate in candidates:
            blocks.setdefault(candidate.block, []).append(candidate)
        assert probe is not None
        keep, options = keep_of(candidates, budget), options_of(candidates, budget)
        at = {c.name: o.ranks[o.within(keep * c.dense_cost)] for c, o in zip(candidates, options, strict=True)}
        raw = {block: probe.loss_change({c.name: at[c.name] for c in found}) for block, found in blocks.items()}
        low, high = min(raw.values()), max(raw.values())
        return {block: 1 + (value - low) / (high - low) if high > low else 1.0 for block, value in raw.items()}
