"""Sequential correction: what earlier layers left of the inputs is made up for."""

from typing import Literal

from lowrank_kit.corrections.refit import Refit


class Sequential(Refit):
    """See `Refit`; every matrix is fitted to its own outputs."""

    kind: Literal["sequential"] = "sequential"
    """Marks the correction."""
