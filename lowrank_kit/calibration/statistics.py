"""What a method may ask calibration for, and what it gets for each linear layer."""

from dataclasses import dataclass
from typing import Literal

from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.moments import Moments

Side = Literal["input", "output", "smaller"]


@dataclass(frozen=True)
class StatisticsRequest:
    """Second moments of a linear's ``input``, of its ``output``, or of whichever costs less.

    ``smaller`` is enough to know the spectrum of the outputs: those of a layer that reads ``x`` follow from the
    moments of ``x`` and the weight, and linears that share one input tensor share its moments.
    """

    moments: Side


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one linear over the real calibration tokens: of its input ``[in, in]`` or output ``[out, out]``.

    Outputs are taken as the layer gives them, bias included.
    """

    ref: LinearRef
    side: Literal["input", "output"]
    moments: Moments
