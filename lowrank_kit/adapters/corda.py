"""CorDA (Yang et al., arXiv 2406.05223): an adapter from the SVD of W weighted by its inputs."""

from typing import ClassVar, Literal

from jaxtyping import Float, Float64

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.eigenpairs import fix_signs, partial_eigh, svd
from lowrank_kit.spectral.factors import LowRankFactors

# Of the damping that makes C invertible: where it begins, and the error of C C^-1 up to which C^-1 is good enough.
LEAST_DAMPING, INVERSE_ERROR = 0.01, 0.05


class Corda(InitialisedAdapter):
    """``s B A`` is made of components of ``U S V^T = SVD(W C)``, ``V^T C^-1`` on the right; the base keeps the rest.

    C [in, in] is the mean over samples of ``X^T X``, X [tokens, in] being a sample's inputs divided by the absolute
    value of their largest entry, and is damped as in the authors' code and PEFT's, whose starts these are up to
    rounding. Both keep all C of a model at once; here those of one block are enough.
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
        moment = _damped(statistics.moments.gram / statistics.moments.count)
        if self.mode == "kpm":
            # A Gram matrix would square what is small already.
            left, values, right = svd(weight @ moment)
            left, values, right = left[:, -rank:], values[-rank:], right[-rank:]
        else:
            left, values, right = _largest(weight @ moment, rank)
        up = fix_signs(left)
        down = torch.linalg.solve(moment, right.T).T * (up * left).sum(0).sign()[:, None]
        return {"up": up.float(), "values": values, "down": down.float()}

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """``B = U (S / s)^1/2``, ``A = (S / s)^1/2 V^T C^-1``."""
        up, values, down = (kept[part].to(weight.device, torch.float64) for part in ("up", "values", "down"))
        root = (values / self.scaling(rank)).sqrt()
        return LowRankFactors(up=up * root, down=root[:, None] * down)


def _damped(moment: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """C with the damping on its diagonal that PEFT finds: doubled until an inverse in float32 holds."""
    identity = torch.eye(moment.shape[0], device=moment.device)
    mean, damping = moment.diagonal().mean(), LEAST_DAMPING
    while True:
        damped = moment + damping * mean * identity
        single = damped.float()
        if torch.dist(single @ torch.linalg.inv(single), identity) < INVERSE_ERROR:
            return damped
        damping *= 2


def _largest(
    weighted: Float64[Tensor, "out in"], rank: int
) -> tuple[Float64[Tensor, "out r"], Float64[Tensor, " r"], Float64[Tensor, "r in"]]:
    """The largest singular components, from the Gram on the smaller side."""
    is_tall = weighted.shape[0] > weighted.shape[1]
    wide = weighted.T if is_tall else weighted
    vectors = partial_eigh(wide @ wide.T, 0, rank).vectors
    left, values, right = svd(vectors.T @ wide)
    left = vectors @ left
    return (right.T, values, left.T) if is_tall else (left, values, right)
