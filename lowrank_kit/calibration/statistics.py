"""What a method may ask calibration for, and what it gets for each linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.moments import Moments

Side = Literal["input", "output", "smaller"]

Distance = Literal["cosine", "angular"]
"""How far a block moves the hidden states."""

# What a method keeps of one layer: small named tensors.
Kept: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class GradientRequest:
    """Which parts of `GradientStatistics` to collect; by default none.

    ``diagonal`` goes with ``moments`` and has their options. ``clipping`` (low, high): in ``moments``, the norms of the
    tokens' gradients are clipped to these multiples of their mean over a window; gradients that are zero stay so.
    ``margin``: the share of a window's tokens at either end, rounded down, whose gradients ``moments`` leave out; the
    mean of ``clipping`` is over the others. ``label_seed``: the loss is that of tokens drawn from the model's own
    predictions, by this seed; None: that of the text's.
    """

    moments: bool = False
    diagonal: bool = False
    fisher: bool = False
    mean: bool = False
    clipping: tuple[float, float] | None = None
    margin: float = 0.0
    label_seed: int | None = None

    def together_with(self, other: "GradientRequest") -> "GradientRequest":
        """What serves both; the options of ``moments`` are those of this one, where it asks for them.

        Raises `ConfigError` for gradients of different losses.
        """
        if self.label_seed != other.label_seed:
            raise ConfigError(
                "one backward pass has either the text's labels or sampled ones, and the allocation reads gradients of "
                "the text's: leave method.truncation.label_seed out, or use another allocation, such as lagrangian"
            )
        first = self if self.moments else other
        return replace(
            first,
            diagonal=self.diagonal or other.diagonal,
            fisher=self.fisher or other.fisher,
            mean=self.mean or other.mean,
        )


@dataclass(frozen=True)
class StatisticsRequest:
    """What calibration has to collect of every linear; by default nothing.

    ``moments``: second moments of its ``input``, of its ``output``, or of whichever costs less. ``smaller`` is enough
    to know the spectrum of the outputs: those of a layer that reads ``x`` follow from the moments of ``x`` and the
    weight, and linears that share one input tensor share its moments.
    ``scaled_samples``: every sample is divided by the absolute value of its largest entry first, and ``count`` is of
    samples (`SampleMoments`); the batches then have a sample each.
    ``magnitudes``: mean absolute value of every input channel. ``gradient``: parts of `GradientStatistics`; None: none.
    """

    moments: Side | None = None
    scaled_samples: bool = False
    magnitudes: bool = False
    gradient: GradientRequest | None = None

    @property
    def reads_activations(self) -> bool:
        """Whether a forward pass is needed for it, gradients apart."""
        return self.moments is not None or self.magnitudes


@dataclass(frozen=True)
class GradientStatistics:
    """Gradients of the next-token loss in one linear, per predicted token of the calibration set.

    With L the sum of the losses of all N predicted tokens, g [out] = dL/dy for one token and x [in] its input:

    ``gram``: ``B = 1/N sum g g^T`` for ``out <= in``, otherwise ``W^T B W``, the same metric as the inputs see it; over
    the tokens that `GradientRequest.margin` leaves, of which N then counts those that predict something. ``energy``:
    the trace of B. ``diagonal``: the diagonal of B itself. ``fisher``: ``1/N`` times the sum over sequences of the
    squared gradient of the sequence's summed loss in W, summed over the outputs: the diagonal empirical Fisher
    information that belongs to every input. ``mean``: ``dL/dW / N``, the gradient of the mean loss.
    What was not asked for is None; ``energy`` is then 0.
    """

    gram: Float[Tensor, "p p"] | None = None
    energy: float = 0.0
    diagonal: Float[Tensor, " out"] | None = None
    fisher: Float[Tensor, " in"] | None = None
    mean: Float[Tensor, "out in"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors in float32, for a cache."""
        parts = {"gram": self.gram, "diagonal": self.diagonal, "fisher": self.fisher, "mean": self.mean}
        kept = {name: tensor.float() for name, tensor in parts.items() if tensor is not None}
        return {**kept, "energy": torch.tensor(self.energy, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "GradientStatistics":
        """What `tensors` was called on."""
        parts = ("diagonal", "fisher", "mean")
        return cls(kept.get("gram"), float(kept["energy"]), *(kept.get(part) for part in parts))


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
