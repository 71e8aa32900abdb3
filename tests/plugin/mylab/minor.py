"""MiLoRA's start (arXiv 2406.09044): an adapter that begins in the minor singular components of W."""

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.spectral.eigenpairs import svd
from lowrank_kit.spectral.factors import LowRankFactors


class Minor(InitialisedAdapter):
    """Start at ``s B A = U_r S_r V_r^T`` of the r smallest singular values."""

    def initialise(self, weight, kept, rank):
        """See `InitialisedAdapter`; ``kept`` is empty, for nothing is calibrated."""
        u, s, vh = svd(weight.detach().double())
        root = (s[-rank:] / self.scaling(rank)).sqrt()
        return LowRankFactors(up=u[:, -rank:] * root, down=root[:, None] * vh[-rank:])
