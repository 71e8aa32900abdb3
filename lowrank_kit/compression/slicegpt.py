"""SliceGPT at work: the bases are found one after another, on a model sliced so far, and written at once.

A basis is the leading eigenvectors of ``sum x x^T`` over calibration tokens, x the output of an RMS norm without
its weight (arXiv 2401.15024, section 3.3), from float32 products in float64 sums. Hidden states stay in the original
coordinates: slicing is their projection on the basis.
"""

from typing import Any

import torch
from jaxtyping import Float, Float64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compression.base import Compression
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.slicegpt import SliceGPT
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.rotate import slice_ends, slice_layer
from lowrank_kit.spectral.moments import Moments


class SliceCompression(Compression[SliceGPT]):
    """See `Compression`."""

    def calibrate(self, progress: Progress | None = None) -> None:
        """Nothing is kept: every basis depends on how narrow those before it are."""
        self.method.check_tokens(self.bench.layout, self.bench.samples.tokens)

    def plan(self, progress: Progress | None = None) -> Plan:
        """Choose the hidden size."""
        return self.method.plan(self.bench.layout)

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Rotate and slice, in place."""
        bench = self.bench
        slice_model(bench.model, bench.samples, self.method.width(bench.layout), bench.batch_size, progress)
        return bench.model


@torch.no_grad()
def slice_model(
    model: PreTrainedModel,
    samples: CalibrationSamples,
    width: int,
    batch_size: int,
    progress: Progress | None = None,
) -> None:
    """Give a model with a `plain_residual` stream one of this width, in place.

    Args:
        model: the original model.
        samples: calibration windows of equal length.
        width: the new hidden size, at most the old one.
        batch_size: windows a batch.
        progress: shows one bar over the blocks.

    Raises:
        LowRankKitError: hidden states that are not finite.
    """
    layout = layout_of(model)
    walk = BlockWalk(model, layout, batches_of(model, samples, batch_size))
    before: Any = None
    first: Any = None
    bar = progress.add_task("rotate and slice", total=len(layout.blocks)) if progress else None
    for block in walk.forward():
        layer: Any = block.module
        if before is None:
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
        slice_layer(layer, before, middle, after)
        before = after
        if progress and bar is not None:
            progress.advance(bar)
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
