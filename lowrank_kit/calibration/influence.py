"""How much a block turns the hidden states that pass through it, over calibration tokens."""

import math
from pathlib import Path

from jaxtyping import Bool, Float, Float64
from rich.progress import Progress

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.calibration.statistics import Distance
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import CalibrationSamples, measured
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.progress import Bar


def block_influence(
    model: PreTrainedModel,
    samples: CalibrationSamples,
    *,
    distance: Distance = "cosine",
    span: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Float64[Tensor, " starts"]:
    """Return the mean distance between the hidden states before block i and before block i + span, for every i.

    The hidden state after the last block is the one before the final norm. One forward pass over the samples, block by
    block; the hidden states of all samples before span + 1 blocks wait as `Hidden` says.

    Args:
        model: of one stack of blocks; in evaluation mode meanwhile, and left as it was found.
        samples: calibration samples; every real token counts once.
        distance: `cosine` is 1 - cos, the block influence of ShortGPT (arXiv 2403.03853) and GRASP (arXiv
            2501.00339); `angular` is arccos(cos) / pi (arXiv 2403.17887).
        span: blocks between the two states; at most all.
        cache: folder of the content-keyed cache; None keeps nothing on disk.
        progress: shows one bar over the blocks.

    Raises:
        LowRankKitError: an encoder-decoder model, or distances that are not finite.
    """
    if cache is None:
        return _measured(model, samples, distance, span, progress)
    asked = {"quantity": "block influence", "distance": distance, "span": span}
    store = CalibrationStore(cache, calibration_key(model, samples, "blocks", asked))
    with store.missing([0]) as missing:
        if missing:
            found = _measured(model, samples, distance, span, progress)
            store.save(0, {"blocks": {"influence": found}})
    return store.load(0)["blocks"]["influence"]


def _measured(
    model: PreTrainedModel, samples: CalibrationSamples, distance: Distance, span: int, progress: Progress | None
) -> Float64[Tensor, " starts"]:
    layout = layout_of(model)
    if len(layout.stacks) != 1:
        raise LowRankKitError(f"this {layout.model_type} has an encoder and a decoder: blocks are ranked in one stack")
    sums = torch.zeros(len(layout.blocks) - span + 1, dtype=torch.float64)
    walk = BlockWalk(model, layout, batches_of(model, samples))
    masks = [measured(batch["attention_mask"], samples.opening).to(model.device) for batch in walk.batches]
    earlier = Hidden(model.device)

    def measure(index: int) -> None:
        """Compare the states before a block with those ``span`` blocks before it, whose place they then take."""
        for number, mask in enumerate(masks):
            key, state = (index % span, number), walk.states[number]
            if index >= span:
                sums[index - span] += hidden_distance(earlier[key], state, mask, distance).sum().item()
            earlier[key] = state

    bar = Bar(progress, "hidden states", len(layout.blocks))
    for block in walk.forward():
        measure(block.index)
        block.pass_on()
        bar.advance()
    measure(len(layout.blocks))
    influence = sums / samples.tokens
    if not influence.isfinite().all():
        worst = int((~influence.isfinite()).nonzero()[0])
        raise LowRankKitError(
            f"the hidden states around {layout.blocks[worst]} are not finite: use dtype=bfloat16 or float32"
        )
    return influence


def hidden_distance(
    first: Float[Tensor, "rows tokens hidden"],
    second: Float[Tensor, "rows tokens hidden"],
    mask: Bool[Tensor, "rows tokens"],
    distance: Distance = "cosine",
) -> Float64[Tensor, " real"]:
    """Return the distance between two states of every real token, computed in float64.

    The angle is between unit vectors, by the lengths of their difference and sum: arccos loses half the digits of
    a small one (Kahan).
    """
    u, v = (_unit(states[mask].double()) for states in (first, second))
    apart = torch.linalg.vector_norm(u - v, dim=-1)
    if distance == "cosine":
        return apart.square() / 2
    return 2 / math.pi * torch.atan2(apart, torch.linalg.vector_norm(u + v, dim=-1))


def _unit(vectors: Float64[Tensor, "real hidden"]) -> Float64[Tensor, "real hidden"]:
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
