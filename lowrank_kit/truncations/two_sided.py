"""Truncation in the Kronecker-factored metric of the loss: inputs on one side, the loss's gradients on the other.

Published relatives: KFAC-SVD and IO-SVD. With C the mean of x x^T and B that of g g^T, g the gradient of the loss at
the layer's output, `||B^(1/2) (W - W') C^(1/2)||_F^2` estimates the second-order change of the loss; its tail sums
compare across matrices.
"""

from collections.abc import Sequence
from math import sqrt
from typing import ClassVar, Literal

from jaxtyping import Float64
from pydantic import Field, field_validator

from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.spectral.truncate import (
    Projection,
    damped_root,
    input_projection,
    output_projection_from_gram,
)
from lowrank_kit.truncations.truncation import Layer, Truncation, mean_inputs, mean_output_gram


class TwoSided(Truncation):
    """SVD of `B^(1/2) W C^(1/2)`, undone by the inverse root of B.

    The options beside `gradient_shrinkage` are those of LEMS (KFAC-SVD, github.com/lems-svd/lems), which sets
    `gradient_shrinkage=0.3 input_shrinkage=0.1 gradient_clipping=[0.1,10] window_margin=0.125`.
    """

    spectrum: ClassVar[str | None] = "two_sided"
    of_loss: ClassVar[bool] = True
    sees_rounding: ClassVar[bool] = True

    kind: Literal["two_sided"] = "two_sided"
    """Marks the truncation."""
    gradient_shrinkage: float = Field(default=0.01, gt=0, lt=1)
    """a in `(1 - a) B + a mean(diagonal of B) I`."""
    input_shrinkage: float = Field(default=0.0, ge=0, lt=1)
    """a in `(1 - a) C + a mean(diagonal of C) I`; above 0 it needs the moments of all inputs, `[in, in]`."""
    gradient_clipping: tuple[float, float] | None = None
    """Least and largest norm of a token's gradient in B, as multiples of the window's mean norm; null: as it is."""
    window_margin: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of a calibration window's tokens, at either end, whose gradients B leaves out."""

    # Left out where they say nothing, so that older run directories are found again.
    label_seed: int | None = Field(default=None, ge=0, exclude_if=lambda seed: seed is None)
    """Seed of labels drawn from the model's own predictions, whose gradients B is then of; null: those of the text."""
    one_sided: tuple[str, ...] = Field(default=(), exclude_if=lambda roles: not roles)
    """Roles for which B is a multiple of the identity with its trace: only their inputs matter, in the same units."""

    @field_validator("gradient_clipping")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0 <= bounds[0] <= 1 <= bounds[1]:
            raise ValueError(f"{list(bounds)} must enclose the mean norm: [low, high] with 0 <= low <= 1 <= high")
        return bounds

    def needs(self) -> StatisticsRequest:
        """As in `Truncation`."""
        gradient = GradientRequest(
            moments=True,
            clipping=self.gradient_clipping,
            margin=self.window_margin,
            label_seed=self.label_seed,
        )
        return StatisticsRequest(moments="input" if self.input_shrinkage else "smaller", gradient=gradient)

    def check(self, layout: ModelLayout) -> None:
        """As in `Truncation`."""
        layout.of_roles(self.one_sided or None)

    def project(self, layers: Sequence[Layer]) -> Projection:
        """As in `Truncation`; `values` are in nats per token, up to the factor of the Gauss-Newton estimate."""
        [layer] = layers
        gradient, weight = layer.statistics.gradient, layer.weight.detach().double()
        assert gradient is not None
        assert gradient.gram is not None
        gram, share = gradient.gram.double(), self._share(layer)
        out_features, in_features = weight.shape
        if out_features <= in_features:
            if share < 1:
                root = sqrt(1 - share) * damped_root(gram, share / (1 - share))
            else:
                root = torch.full((out_features,), sqrt(gradient.energy / out_features)).to(gram)
            outputs = mean_output_gram(layer)
            if self.input_shrinkage:
                outputs = self._shrunk(outputs, layer, weight @ weight.T)
            return output_projection_from_gram(outputs, root)
        return input_projection(*self.seen_by_inputs(layer))

    def seen_by_inputs(self, layer: Layer) -> tuple[Float64[Tensor, "in in"], Float64[Tensor, "in in"]]:
        """As in `Truncation`, both shrunk."""
        gradient, weight = layer.statistics.gradient, layer.weight.detach().double()
        assert gradient is not None
        assert gradient.gram is not None
        gram, share = gradient.gram.double(), self._share(layer)
        out_features, in_features = weight.shape
        if out_features <= in_features:
            gram = weight.T @ gram @ weight
        metric = (1 - share) * gram + share * gradient.energy / out_features * weight.T @ weight
        moments = layer.statistics.moments
        inputs = moments.gram / moments.count
        if self.input_shrinkage:
            inputs = self._shrunk(inputs, layer, torch.eye(in_features).to(inputs))
        return inputs, metric

    def diagonals(self, layer: Layer) -> tuple[Float64[Tensor, " out"], Float64[Tensor, " in"]]:
        """As in `Truncation`, both shrunk."""
        assert layer.statistics.gradient is not None
        assert layer.statistics.gradient.diagonal is not None
        shares = self._share(layer), self.input_shrinkage
        found = layer.statistics.gradient.diagonal.double(), mean_inputs(layer).gram.diagonal()
        rows, columns = (torch.lerp(d, d.mean().expand_as(d), share) for d, share in zip(found, shares, strict=True))
        return rows, columns

    def _share(self, layer: Layer) -> float:
        """The share of the identity in B."""
        return 1.0 if layer.statistics.ref.role in self.one_sided else self.gradient_shrinkage

    def _shrunk(self, gram: Tensor, layer: Layer, identity: Tensor) -> Tensor:
        """C shrunk, as `gram` and `identity` see C and the identity matrix."""
        moments, share = layer.statistics.moments, self.input_shrinkage
        mean = float(moments.gram.diagonal().mean()) / moments.count
        return (1 - share) * gram + share * mean * identity
