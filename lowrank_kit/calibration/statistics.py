"""What a method may ask calibration for, and what it gets for each linear layer."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float

from lowrank_kit.deferred import Tensor
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.moments import Moments

Side = Literal["input", "output", "smaller"]

Distance = Literal["cosine", "angular"]
"""How far a block moves the hidden states."""

# What a method keeps of one layer: small named tensors.
Kept: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class StatisticsRequest:
    """What calibration has to collect of every linear; by default nothing.

    ``moments``: second moments of its ``input``, of its ``output``, or of whichever costs less. ``smaller`` is enough
    to know the spectrum of the outputs: those of a layer that reads ``x`` follow from the moments of ``x`` and the
    weight, and linears that share one input tensor share its moments.
    ``magnitudes``: mean absolute value of every input channel. ``gradient``: `GradientStatistics`, ``all`` with their
    ``mean``.
    """

    moments: Side | None = None
    magnitudes: bool = False
    gradient: Literal["none", "moments", "all"] = "none"

    @property
    def reads_activations(self) -> bool:
        """Whether a forward pass is needed for it, gradients apart."""
        return self.moments is not None or self.magnitudes


@dataclass(frozen=True)
class GradientStatistics:
    """Gradients of the token-summed next-token loss in one linear, over all calibration tokens.

    With g [out] the gradient at the layer's output for one token, and x [in] its input:

    ``gram``: sum of ``g g^T`` for ``out <= in``; otherwise of ``(W^T g)(W^T g)^T``, the same metric as the inputs
    see it. ``energy``: sum of ``|g|^2``, the trace of the former. ``rows``: sum of ``g_i^2 |x|^2``, the diagonal
    Fisher information of the weight summed over each row. ``mean``: the gradient of the MEAN loss in the weight.
    """

    tokens: int
    gram: Float[Tensor, "p p"]
    energy: float
    rows: Float[Tensor, " out"]
    mean: Float[Tensor, "out in"] | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """What was collected of one linear over the real calibration tokens.

    ``moments`` are of its input ``[in, in]`` or output ``[out, out]``, as ``side`` says; outputs are taken as the layer
    gives them, bias included. Moments of width 0 stand where none were asked for.
    """

    ref: LinearRef
    side: Literal["input", "output"]
    moments: Moments
    magnitudes: Float[Tensor, " in"] | None = None
    gradient: GradientStatistics | None = None
