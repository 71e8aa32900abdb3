"""SliceGPT: rotate the residual stream to its principal components and delete the smallest (arXiv 2401.15024)."""

from pydantic import Field

from lowrank_kit.errors import ConfigError
from lowrank_kit.methods.base import Compressor, Plan
from lowrank_kit.models.architectures import LOWRANK_PREFIX, all_with, architecture_of
from lowrank_kit.models.layout import LinearRef, ModelLayout


class SliceGPT(Compressor):
    """One hidden size for the whole model, with two shortcut matrices a block between the bases of its residuals.

    The shortcuts, ``[width, width]`` each, count as decoder-linear parameters: `ratio` is what is removed net of
    them, so that a larger share of the hidden size goes (the paper's "slicing" is that share). The budget is met
    from below, by less than one step of `multiple` in the width. Embedding and head shrink too, uncounted; a tied
    head gets a matrix of its own.
    """

    multiple: int = Field(default=8, ge=1)
    """The hidden size that is left is a multiple of this."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for another family, or a ratio that leaves no direction at all."""
        if layout.model_type.startswith(LOWRANK_PREFIX) or not architecture_of(layout.model_type).plain_residual:
            sliceable = ", ".join(all_with(lambda architecture: architecture.plain_residual))
            raise ConfigError(
                f"method={self.name} slices {sliceable} models as they come; this one is a {layout.model_type}"
            )
        layout.select()
        self.width(layout)

    def check_tokens(self, layout: ModelLayout, tokens: int) -> None:
        """Raise `ConfigError` for fewer tokens than directions kept: they would not be determined."""
        if tokens < (width := self.width(layout)):
            raise ConfigError(
                f"{tokens} calibration tokens cannot determine {width} directions of the residual stream: raise "
                f"calibration.samples or calibration.seq_len; their product should be ten times {width}, at least "
                f"{width}"
            )

    def width(self, layout: ModelLayout) -> int:
        """The largest hidden size within the budget. Raises `ConfigError` if there is none."""
        hidden = layout.linears[0].in_features
        widths = range(hidden - hidden % self.multiple, 0, -self.multiple)
        for width in widths:
            if self._parameters(layout, width) <= self.budget(layout):
                return width
        total = sum(ref.out_features * ref.in_features for ref in layout.linears)
        if not widths:
            raise ConfigError(
                f"method.multiple={self.multiple} exceeds the hidden size {hidden}: choose a divisor of it"
            )
        highest = 1 - self._parameters(layout, widths[-1]) / total
        raise ConfigError(
            f"method.ratio={self.ratio} cannot be met: with a hidden size of {widths[-1]} the matrices and their "
            f"shortcuts are still {1 - highest:.4f} of the decoder-linear parameters; the nearest feasible ratio is "
            f"{int(highest * 1e4) / 1e4}, or lower method.multiple"
        )

    def plan(self, layout: ModelLayout) -> Plan:
        """What slicing leaves of every matrix: the smaller of its new sides."""
        width = self.width(layout)
        ranks = {ref.name: min(width, _other_side(ref)) for ref in layout.linears}
        before = sum(ref.out_features * ref.in_features for ref in layout.linears)
        blocks = tuple(range(len(layout.blocks)))
        return Plan(self.name, ranks, blocks, before, self._parameters(layout, width))

    def _parameters(self, layout: ModelLayout, width: int) -> int:
        shortcuts = 2 * len(layout.blocks) * width**2
        return width * sum(_other_side(ref) for ref in layout.linears) + shortcuts


def _other_side(ref: LinearRef) -> int:
    """The side that is not the residual stream."""
    return ref.in_features if ref.writes_residual else ref.out_features
