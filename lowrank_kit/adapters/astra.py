"""Astra: an adapter that lives in chosen eigenvectors of a layer's output activations, or of its inputs.

Source: arXiv 2602.19111. With C = sum y y^T over the outputs y [out] of a layer (uncentred, bias included) and
Q [out, r] some of its eigenvectors, the adapter starts at B = Q, A = Q^T W, and the base at W - s B A, so that the
adapted layer equals the original one. The paper's text takes the eigenvectors of SMALLEST eigenvalue ("tail"), so
that updates stay away from the dominant activations; the authors' released code takes the LARGEST ("top").

On the input side Q [in, r] are eigenvectors of sum x x^T, A = Q^T and B = W Q. The tail there is LoRA-Null
(arXiv 2503.02659): what the calibration text says to a layer has no part along Q.
"""

from collections.abc import Mapping
from math import log1p
from typing import Literal
from zlib import crc32

from jaxtyping import Float, Float64
from pydantic import Field

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.allocate import allocate
from lowrank_kit.spectral.eigenpairs import (
    Eigenpairs,
    Which,
    complete_basis,
    eigenvalues,
    output_eigenpairs,
    output_eigenvalues,
    random_orthonormal,
    range_eigenpairs,
)
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.metrics import effective_rank

PAIRS: dict[str, Which] = {"tail": "smallest", "top": "largest", "middle": "middle"}

# An allocation may give a matrix up to this many times its configured rank.
LARGEST_SHARE = 2


class Astra(InitialisedAdapter):
    """Astra with the choice of eigenvectors as an option."""

    subspace: Literal["tail", "top", "middle", "random"] = "tail"
    """Eigenvectors of smallest, largest or middling eigenvalue, or random orthonormal directions (control)."""
    side: Literal["output", "input"] = "output"
    """Whose eigenvectors: the outputs' (B = Q, A = Q^T W) or the inputs' (A = Q^T, B = W Q)."""
    null_space: bool = False
    """Let `tail` use directions that the calibration text never reaches (on the output side A starts near zero there).
    Default: not."""
    allocation: Literal["uniform", "effective_rank"] = "uniform"
    """`effective_rank`: ranks in proportion to log(R + 1), R the effective rank of each output spectrum, at the same
    number of trained parameters (the released code: at the same sum of ranks)."""
    seed: int = Field(default=0, ge=0)
    """Seed of `subspace=random`."""

    def needs(self) -> StatisticsRequest:
        """The inputs' moments, or those of the cheaper side: the output spectrum follows from either."""
        return StatisticsRequest(moments="input" if self.side == "input" else "smaller")

    def reduction_key(self) -> dict[str, object]:
        """Every setting that decides which eigenvectors are kept, and how many."""
        fields = {"subspace", "side", "null_space", "allocation", "rank", "rank_pattern"}
        if self.subspace == "random":
            fields.add("seed")
        return {"method": "astra", **self.model_dump(mode="json", include=fields)}

    def reduce(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, statistics: LayerStatistics
    ) -> Kept:
        """Keep the chosen eigenvectors in order of preference, with their eigenvalues.

        Returns:
            ``basis [out or in, r]``, ``energy [r]`` (sum of squared activations along each, NaN for random directions),
            and with ``allocation=effective_rank`` the whole ``spectrum``.
        """
        ref = statistics.ref
        count = self._largest_rank(ref)
        if self.subspace == "random":
            # Equal layers must not share their directions.
            basis = random_orthonormal(self._size(ref), count, self.seed + crc32(ref.name.encode()))
            chosen = Eigenpairs(basis.new_full((count,), torch.nan), basis)
        else:
            chosen = self._eigenpairs(weight, bias, statistics, count)
            found, rank = chosen.values.shape[0], self._configured_rank(ref)
            if found < rank:
                raise LowRankKitError(
                    f"the calibration {self.side}s of {ref.name} span only {found} directions, fewer than its rank "
                    f"{rank}: raise calibration.samples or calibration.seq_len, or lower method.rank"
                )
        kept = {"basis": chosen.vectors.float(), "energy": chosen.values}
        if self.allocation == "effective_rank":
            kept["spectrum"] = self._spectrum(weight, bias, statistics)
        return kept

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """Give every target its rank: the configured one, or a share by log(R + 1) at equal parameters."""
        ranks = self.base_ranks(layout)
        if self.allocation == "uniform":
            return self._plan_of(layout, ranks)
        targets = self.targets(layout)
        cost = [self.trained_by(ref, 1) for ref in targets]
        scores = {ref.name: log1p(effective_rank(kept[ref.name]["spectrum"])) for ref in targets}
        configured = [c * ranks[ref.name] for c, ref in zip(cost, targets, strict=True)]
        weights = [price * scores[ref.name] for price, ref in zip(configured, targets, strict=True)]
        most = [kept[ref.name]["basis"].shape[1] for ref in targets]
        prices = [range(c, c * m + 1, c) for c, m in zip(cost, most, strict=True)]
        paid = allocate(weights, prices, cost, sum(configured))
        return self._plan_of(layout, {ref.name: n + 1 for ref, n in zip(targets, paid, strict=True)}, scores)

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """``B = Q``, ``A = Q^T W``; on the input side ``B = W Q``, ``A = Q^T``."""
        basis = kept["basis"][:, :rank].to(weight.device, torch.float64)
        if self.side == "input":
            return LowRankFactors(up=weight.detach().double() @ basis, down=basis.T)
        return LowRankFactors(up=basis, down=basis.T @ weight.detach().double())

    def _eigenpairs(self, weight: Tensor, bias: Tensor | None, statistics: LayerStatistics, count: int) -> Eigenpairs:
        which = PAIRS[self.subspace]
        wanted = None if self.subspace == "tail" and self.null_space else count
        moments = statistics.moments
        if statistics.side == self.side:
            pairs = range_eigenpairs(moments.gram, wanted, which, rank_bound=moments.count)
        else:
            pairs = output_eigenpairs(weight, moments, bias, count=wanted, which=which)
        if wanted is None:
            pairs = _with_null_space(pairs, self._size(statistics.ref))
        order = _preference(self.subspace, pairs.values.shape[0])[:count]
        return Eigenpairs(pairs.values[order], pairs.vectors[:, order])

    def _spectrum(self, weight: Tensor, bias: Tensor | None, statistics: LayerStatistics) -> Float64[Tensor, " p"]:
        if statistics.side == self.side:
            return eigenvalues(statistics.moments.gram)
        return output_eigenvalues(weight, statistics.moments, bias)

    def _size(self, ref: LinearRef) -> int:
        return ref.in_features if self.side == "input" else ref.out_features

    def _largest_rank(self, ref: LinearRef) -> int:
        rank = self._configured_rank(ref)
        if self.allocation == "uniform":
            return rank
        return min(LARGEST_SHARE * rank, ref.in_features, ref.out_features)


def _with_null_space(pairs: Eigenpairs, size: int) -> Eigenpairs:
    """The pairs of the whole range, followed by an orthonormal basis of what it leaves out."""
    missing = size - pairs.values.shape[0]
    null = complete_basis(pairs.vectors, missing)
    return Eigenpairs(torch.cat([pairs.values, pairs.values.new_zeros(missing)]), torch.cat([pairs.vectors, null], 1))


def _preference(subspace: str, size: int) -> list[int]:
    """Indices of descending eigenvalues, the most wanted first, so that a smaller rank takes the first columns."""
    if subspace == "middle":
        return sorted(range(size), key=lambda i: abs(i - (size - 1) / 2))
    return list(range(size)) if subspace == "top" else list(range(size))[::-1]
