"""Sequential correction that also makes up for what the residual stream lacks."""

from typing import Literal

from lowrank_kit.corrections.refit import Refit


class Residual(Refit):
    """See `Refit`; what writes to the residual stream (o, down) is fitted to `W x + (h - h')`.

    h and h' are the streams of the original and of the compressed model that the outputs are added to.
    """

    kind: Literal["residual"] = "residual"
    """Marks the correction."""

    @property
    def to_stream(self) -> bool:
        """See `Refit`."""
        return True
