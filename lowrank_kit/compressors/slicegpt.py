"""SliceGPT: rotate the residual stream to its principal components and delete the smallest (arXiv 2401.15024).

A basis is the leading eigenvectors of ``sum x x^T`` over calibration tokens, x the output of an RMS norm without
its weight (section 3.3), from float32 products in float64 sums. The bases are found one after another, on a model
sliced so far, and written at once. Hidden states stay in the original coordinates: slicing is their projection on the
basis.
"""

from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Float64
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.architectures import LOWRANK_PREFIX, all_with, architecture_of
from lowrank_kit.models.layout import LinearRef, ModelLayout, layout_of
from lowrank_kit.models.rotate import slice_ends, slice_layer
from lowrank_kit.plan import Plan
from lowrank_kit.progress import Bar
from lowrank_kit.spectral.moments import Moments

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel


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
        total = layout.parameters
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

    def calibrate(self, context: Context) -> None:
        """Nothing is kept: every basis depends on how narrow those before it are."""
        self.check_tokens(context.layout, context.samples.tokens)

    def plan(self, statistics: None, context: Context) -> Plan:
        """Choose the hidden size."""
        return self.decide(context.layout)

    def apply(self, plan: Plan, statistics: None, context: Context) -> "PreTrainedModel":
        """Rotate and slice, in place."""
        width = self.width(context.layout)
        slice_model(context.model, context.samples, width, context.progress)
        return context.model

    def decide(self, layout: ModelLayout) -> Plan:
        """What slicing leaves of every matrix: the smaller of its new sides."""
        width = self.width(layout)
        ranks = {ref.name: min(width, _other_side(ref)) for ref in layout.linears}
        before = layout.parameters
        blocks = tuple(range(len(layout.blocks)))
        return Plan(self.name, ranks, blocks, before, self._parameters(layout, width))

    def _parameters(self, layout: ModelLayout, width: int) -> int:
        shortcuts = 2 * len(layout.blocks) * width**2
        return width * sum(_other_side(ref) for ref in layout.linears) + shortcuts


def _other_side(ref: LinearRef) -> int:
    """The side that is not the residual stream."""
    return ref.in_features if ref.writes_residual else ref.out_features


@no_grad
def slice_model(
    model: "PreTrainedModel", samples: CalibrationSamples, width: int, progress: "Progress | None" = None
) -> None:
    """Give a model with a `plain_residual` stream one of this width, in place.

    Args:
        model: the original model.
        samples: calibration windows of equal length.
        width: the new hidden size, at most the old one.
        progress: shows one bar over the blocks.

    Raises:
        LowRankKitError: hidden states that are not finite.
    """
    layout = layout_of(model)
    walk = BlockWalk(model, layout, batches_of(model, samples))
    first: Any = None
    before: Any = None
    bar = Bar(progress, "rotate and slice", len(layout.blocks))
    for block in walk.forward():
        layer: Any = block.module
        if block.index == 0:
            first = before = _basis(walk, samples.opening, width, "the embeddings")
        for number in walk.numbers:
            seen = _projected(walk.states[number], before)
            call = walk.call(block.index, number)
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(seen), **call.kwargs)
            walk.states[number] = seen + attended
        middle = _basis(walk, samples.opening, width, f"the attention of block {block.index}")
        for number in walk.numbers:
            seen = _projected(walk.states[number], middle)
            walk.states[number] = seen + layer.mlp(layer.post_attention_layernorm(seen))
        block.is_passed = True
        after = _basis(walk, samples.opening, width, f"block {block.index}")
        slice_layer(model, layout, block.index, before, middle, after)
        before = after
        bar.advance()
    slice_ends(model, layout, first, before)


def _projected(hidden: Float[Tensor, "rows tokens d"], basis: Float64[Tensor, "d width"]) -> Tensor:
    basis = basis.to(hidden.dtype)
    return hidden @ basis @ basis.T


def _basis(walk: BlockWalk, opening: int, width: int, where: str) -> Float64[Tensor, "d width"]:
    """The leading principal directions of the normalised hidden states."""
    model = walk.model
    sums = Moments.zeros(model.config.hidden_size, model.device)
    for number in walk.numbers:
        rows = walk.states[number][:, opening:].float()
        try:
            sums.update(rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps))
        except ValueError as error:
            raise LowRankKitError(f"calibration on what leaves {where}: {error}") from error
    return torch.linalg.eigh(sums.gram).eigenvectors.flip(1)[:, :width]
