"""MiLoRA (Wang et al., arXiv 2406.09044): an adapter that starts as the minor singular components of W."""

from jaxtyping import Float
from torch import Tensor

from lowrank_kit.calibration.collect import Kept
from lowrank_kit.methods.base import InitialisedAdapter, LowRankFactors
from lowrank_kit.spectral.decompose import svd


class Milora(InitialisedAdapter):
    """``s B A`` is ``U_m S_m V_m^T`` of the r smallest singular values, so that the base keeps the principal part."""

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """``B = U_m (S_m / s)^1/2``, ``A = (S_m / s)^1/2 V_m^T`` (section 3.2)."""
        u, s, vh = svd(weight.detach())
        root = (s[-rank:] / self.scaling(rank)).sqrt()
        return LowRankFactors(up=u[:, -rank:] * root, down=root[:, None] * vh[-rank:])
