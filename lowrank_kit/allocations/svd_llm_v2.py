"""SVD-LLM v2: inside a role, a matrix with a smaller truncation loss is cut more (arXiv 2503.12340, section 3.1)."""

from collections.abc import Sequence
from math import log1p
from typing import Literal

from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import keep_of, proportional, share_out


class SvdLlmV2(Allocation):
    """Removed ratio ``R_i = n R v_i / sum v`` over the n matrices of a role, with ``v = 1 / log L_i``.

    L is the truncation loss at the uniform ratio R, a norm over all calibration tokens; whether it is squared makes
    no difference. Here ``v = 1 / log(1 + L)``, positive for any L and the same for the large L of the paper.
    The authors' code is not public; the rule is checked against an independent one (LEMS, `svd_llmv2.py`).
    """

    kind: Literal["svd_llm_v2"] = "svd_llm_v2"
    """Marks the rule."""
    tokens: int = Field(default=524288, ge=1)
    """Tokens that L is a sum over: the more, the more alike the logarithms. The paper: 256 samples of 2048."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """See `Allocation.ranks`."""
        keep, roles = keep_of(candidates, budget), [candidate.role for candidate in candidates]
        dense = [candidate.dense_cost for candidate in candidates]
        tails = [float(c.tail[int(c.rank_at(keep * cost)) :].sum()) for c, cost in zip(candidates, dense, strict=True)]
        # A matrix without any loss has v = infinity; the bound keeps the arithmetic finite.
        scores = [cost / max(log1p((self.tokens * t) ** 0.5), 1e-9) for cost, t in zip(dense, tails, strict=True)]
        removed = share_out(scores, roles, dense)
        weights = [max(cost - (1 - keep) * cut, 0.0) for cost, cut in zip(dense, removed, strict=True)]
        return proportional(candidates, budget, weights)
