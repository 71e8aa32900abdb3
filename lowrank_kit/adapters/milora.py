"""MiLoRA (Wang et al., arXiv 2406.09044): an adapter that starts as the minor singular components of W."""

from jaxtyping import Float

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.deferred import Tensor
from lowrank_kit.spectral.eigenpairs import fix_signs, partial_eigh, svd
from lowrank_kit.spectral.factors import LowRankFactors


class Milora(InitialisedAdapter):
    """``s B A`` is ``U_m S_m V_m^T`` of the r smallest singular values, so that the base keeps the principal part."""

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """``B = U_m (S_m / s)^1/2``, ``A = (S_m / s)^1/2 V_m^T`` (section 3.2).

        The r vectors' span comes from the Gram on the smaller side, in a quarter of the time of a whole SVD.
        """
        is_tall = weight.shape[0] > weight.shape[1]
        wide = (weight.T if is_tall else weight).detach().double()
        side = wide.shape[0]
        minor = partial_eigh(wide @ wide.T, side - rank, side).vectors
        u, s, vh = svd(minor.T @ wide)
        left, right = (vh.T, minor @ u) if is_tall else (minor @ u, vh.T)
        up = fix_signs(left)
        down = right * (up * left).sum(0).sign()
        root = (s / self.scaling(rank)).sqrt()
        return LowRankFactors(up=up * root, down=root[:, None] * down.T)
