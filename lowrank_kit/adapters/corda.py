"""CorDA (Yang et al., arXiv 2406.05223): an adapter from the SVD of W weighted by its inputs."""

from typing import ClassVar, Literal

from jaxtyping import Float

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.spectral.eigenpairs import fix_signs, svd
from lowrank_kit.spectral.factors import LowRankFactors

DAMPING = 0.01
"""What makes C invertible, as a share of its mean diagonal."""


class Corda(InitialisedAdapter):
    """``s B A`` is made of components of ``U S V^T = SVD(W C)``, ``V^T C^-1`` on the right; the base keeps the rest.

    C [in, in] is the mean over samples of ``X^T X``, X [tokens, in] being a sample's inputs divided by the absolute
    value of their largest entry, plus `DAMPING`. The authors' code and PEFT compute in float32, and double the damping
    where their inverse of C does not hold; in float64 it does. Both keep all C of a model at once; here those of one
    block are enough.
    """

    rows_a_batch: ClassVar[int | None] = 1

    mode: Literal["ipm", "kpm"] = "ipm"
    """`ipm` (instruction-previewed): the r largest components of the task's own text. `kpm` (knowledge-preserved): the
    r smallest, of text whose knowledge is to stay."""

    def needs(self) -> StatisticsRequest:
        """The inputs' moments, a sample as large as another."""
        return StatisticsRequest(moments="input", scaled_samples=True)

    def reduction_key(self) -> dict[str, object]:
        """What decides which components are kept, and how many."""
        return self.model_dump(mode="json", include={"mode", "rank", "rank_pattern"})

    def reduce(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, statistics: LayerStatistics
    ) -> Kept:
        """Keep ``up [out, r]`` (U), ``values [r]`` (S) and ``down [r, in]`` (``V^T C^-1``) of the chosen components."""
        weight, rank = weight.detach().double(), self._configured_rank(statistics.ref)
        if not statistics.moments.count:
            raise LowRankKitError(
                f"no calibration sample reaches {statistics.ref.name}: raise calibration.samples, or leave its role "
                f"({statistics.ref.role}) out of method.roles"
            )
        moment = statistics.moments.gram / statistics.moments.count
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        # No Gram matrix of the product: C is a square already, and one channel may dwarf the others.
        left, values, right = svd(weight @ moment)
        chosen = slice(-rank, None) if self.mode == "kpm" else slice(rank)
        left, values, right = left[:, chosen], values[chosen], right[chosen]
        up = fix_signs(left)
        down = torch.linalg.solve(moment, right.T).T * (up * left).sum(0).sign()[:, None]
        return {"up": up.float(), "values": values, "down": down.float()}

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """``B = U (S / s)^1/2``, ``A = (S / s)^1/2 V^T C^-1``."""
        up, values, down = (kept[part].to(weight.device, torch.float64) for part in ("up", "values", "down"))
        root = (values / self.scaling(rank)).sqrt()
        return LowRankFactors(up=up * root, down=root[:, None] * down)
