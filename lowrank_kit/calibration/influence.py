"""How much a block turns the hidden states that pass through it, over calibration tokens."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Float64
from rich.progress import Progress

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.statistics import Distance
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import CalibrationSamples, measured
from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import ModelLayout


def block_influence(
    model: PreTrainedModel,
    layout: ModelLayout,
    samples: CalibrationSamples,
    batch_size: int,
    *,
    distance: Distance = "cosine",
    span: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Float64[Tensor, " starts"]:
    """Return the mean distance between the hidden states before block i and before block i + span, for every i.

    The hidden state after the last block is the one before the final norm. One forward pass over the samples;
    beside the model's own activations, span + 1 hidden states of one batch are held.

    Args:
        model: in evaluation mode meanwhile; left as it was found.
        layout: its layout, of one stack of blocks.
        samples: calibration samples; every real token counts once.
        batch_size: sequences a batch.
        distance: `cosine` is 1 - cos, the block influence of ShortGPT (arXiv 2403.03853) and GRASP (arXiv
            2501.00339); `angular` is arccos(cos) / pi (arXiv 2403.17887).
        span: blocks between the two states; at most all.
        cache: folder of the content-keyed cache; None keeps nothing on disk.
        progress: shows one bar over the batches.

    Raises:
        LowRankKitError: an encoder-decoder model, or distances that are not finite.
    """
    if cache is None:
        return _measured(model, layout, samples, batch_size, distance, span, progress)
    asked = {"quantity": "block influence", "distance": distance, "span": span}
    store = CalibrationStore(cache, calibration_key(model, layout, samples, batch_size, "blocks", asked))
    with store.missing([0]) as missing:
        if missing:
            found = _measured(model, layout, samples, batch_size, distance, span, progress)
            store.save(0, {"blocks": {"influence": found}})
    return store.load(0)["blocks"]["influence"]


def _measured(
    model: PreTrainedModel,
    layout: ModelLayout,
    samples: CalibrationSamples,
    batch_size: int,
    distance: Distance,
    span: int,
    progress: Progress | None,
) -> Float64[Tensor, " starts"]:
    sums = torch.zeros(len(layout.blocks) - span + 1, dtype=torch.float64)
    for mask, states in hidden_states(model, layout, samples, batch_size, progress):
        held: deque[Tensor] = deque(maxlen=span + 1)

        def measure(index: int, state: Tensor, mask: Tensor = mask, held: deque[Tensor] = held) -> None:
            held.append(state)
            if index >= span:
                sums[index - span] += hidden_distance(held[0], state, mask, distance).sum().item()

        states(measure)
    influence = sums / samples.tokens
    if not influence.isfinite().all():
        block = int((~influence.isfinite()).nonzero()[0])
        raise LowRankKitError(
            f"the hidden states around {layout.blocks[block]} are not finite: use dtype=bfloat16 or float32"
        )
    return influence


Visit = Callable[[int, Tensor], None]


def hidden_states(
    model: PreTrainedModel,
    layout: ModelLayout,
    samples: CalibrationSamples,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Bool[Tensor, "rows tokens"], Callable[[Visit], None]]]:
    """Yield every batch's mask of the tokens that are measured at, and what runs the model on it.

    The latter calls ``visit(i, state)`` with the state ``[rows, tokens, hidden]`` before block i, for the last i
    with the state after the last block, before the final norm. The model is in evaluation mode meanwhile.
    Raises `LowRankKitError` for an encoder-decoder model.
    """
    if len(layout.stacks) != 1:
        raise LowRankKitError(f"this {layout.model_type} has an encoder and a decoder: blocks are ranked in one stack")
    batches = batches_of(model, samples, batch_size)
    task = progress.add_task("hidden states", total=len(batches)) if progress else None
    blocks = [model.get_submodule(path) for path in layout.blocks]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: values.to(model.device) for name, values in batch.items()}

            def run(visit: Visit, inputs: dict[str, Tensor] = inputs) -> None:
                with _visited(blocks, visit), torch.no_grad():
                    # The base model: logits over a large vocabulary would be the largest tensor of all.
                    model.base_model(**inputs, use_cache=False)

            yield measured(inputs["attention_mask"], samples.opening), run
            if progress and task is not None:
                progress.advance(task)
    finally:
        model.train(was_training)


@contextmanager
def _visited(blocks: "list[nn.Module]", visit: Visit) -> Iterator[None]:
    def before(index: int) -> Callable[..., None]:
        def hook(_module: "nn.Module", inputs: tuple[Any, ...]) -> None:
            visit(index, inputs[0])

        return hook

    def after(_module: "nn.Module", _inputs: Any, output: Any) -> None:
        visit(len(blocks), output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(before(index)).remove)
        stack.callback(blocks[-1].register_forward_hook(after).remove)
        yield


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
