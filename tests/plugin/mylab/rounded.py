"""Two factors whose values bfloat16 can hold."""

from typing import Literal

from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.two_factors import Factors


class Rounded(Factors):
    """Two factors, rounded to bfloat16 whatever the model's number format is."""

    kind: Literal["rounded"] = "rounded"
    """Marks the storage."""

    def put(self, model, names, factors):
        """See `Storage`."""
        super().put(model, names, LowRankFactors(factors.up.bfloat16(), factors.down.bfloat16()))
