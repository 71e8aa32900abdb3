"""SliceGPT at work: the bases are found one after another, on a model sliced so far, and written at once.

A basis is the leading eigenvectors of ``sum x x^T`` over calibration tokens, x the output of an RMS norm without
its weight (arXiv 2401.15024, section 3.3), from float32 products in float64 sums. Hidden states stay in the original
coordinates: slicing is their projection on the basis.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.stream import record_calls
from lowrank_kit.calibration.texts import CalibrationSamples
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
    model.eval()
    layers = [model.get_submodule(path) for path in layout.blocks]
    batches = batches_of(model, samples, batch_size)
    recorded = [record_calls(model, layers, {k: v.to(model.device) for k, v in b.items()}) for b in batches]
    states, opening = [hidden[0] for hidden, _ in recorded], samples.opening
    first = before = _basis(model, states, opening, width, "the embeddings")
    bar = progress.add_task("rotate and slice", total=len(layers)) if progress else None
    for index, layer in enumerate(layers):
        for hidden, (_, calls) in zip(states, recorded, strict=True):
            seen = _projected(hidden.to(model.device), before)
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(seen), **calls[index].kwargs)
            hidden.copy_(seen + attended)
        middle = _basis(model, states, opening, width, f"the attention of block {index}")
        for hidden in states:
            seen = _projected(hidden.to(model.device), middle)
            hidden.copy_(seen + layer.mlp(layer.post_attention_layernorm(seen)))
        after = _basis(model, states, opening, width, f"block {index}")
        slice_layer(layer, before, middle, after)
        before = after
        if progress and bar is not None:
            progress.advance(bar)
    slice_ends(model, layout, first, before)


def _projected(hidden: Float[Tensor, "rows tokens d"], basis: Float64[Tensor, "d width"]) -> Tensor:
    basis = basis.to(hidden.dtype)
    return hidden @ basis @ basis.T


def _basis(
    model: PreTrainedModel, states: Iterable[Float[Tensor, "_ _ d"]], opening: int, width: int, where: str
) -> Float64[Tensor, "d width"]:
    """The leading principal directions of the normalised hidden states."""
    epsilon = model.config.rms_norm_eps
    sums = Moments.zeros(model.config.hidden_size, model.device)
    for hidden in states:
        rows = hidden[:, opening:].to(model.device).float()
        try:
            sums.update(rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon))
        except ValueError as error:
            raise LowRankKitError(f"calibration on what leaves {where}: {error}") from error
    return torch.linalg.eigh(sums.gram).eigenvectors.flip(1)[:, :width]
