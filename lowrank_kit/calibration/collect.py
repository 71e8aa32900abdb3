"""Calibrate a model for a method: stream the statistics, reduce each layer's at once, keep the results."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_kit.calibration.statistics import LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.load import fingerprint

# What a method keeps of one layer: small named tensors.
Kept = dict[str, Tensor]

# Settings of heads and bookkeeping: activations of the blocks do not depend on them.
NOT_OF_THE_BLOCKS = {
    "architectures",
    "classifier_dropout",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
    "use_cache",
}


def calibrate(
    model: PreTrainedModel,
    layout: ModelLayout,
    samples: CalibrationSamples,
    refs: Collection[LinearRef],
    request: StatisticsRequest,
    reduce: Callable[[LayerStatistics], Kept],
    *,
    batch_size: int,
    cache: Path | None = None,
    reduction_key: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Kept]:
    """Return what ``reduce`` keeps of every linear in ``refs``, by the linear's name.

    Args:
        model: the model; only its blocks and embeddings matter.
        layout: its layout.
        samples: the calibration samples. An encoder-decoder model whose samples have no ``decoder_input_ids``
            reads its own input shifted right, as its sequence classifiers do.
        refs: the linears to calibrate.
        request: which moments ``reduce`` reads.
        reduce: called once a linear, while no other block's moments are held; its tensors are moved to the CPU.
        batch_size: sequences a batch.
        cache: folder of the content-keyed cache; None keeps nothing on disk.
        reduction_key: what the outcome of ``reduce`` depends on beside the statistics, JSON-serialisable.
        progress: shows one bar over the blocks.
    """
    if model.config.is_encoder_decoder:
        samples = samples.with_decoder_inputs(model.config.decoder_start_token_id)
    store = None
    if cache is not None:
        key = {
            "model": fingerprint(model, layout),
            "config": _below_the_head(model.config),
            "samples": samples.fingerprint(),
            "batch_size": batch_size,
            "dtype": str(model.dtype),
            "moments": request.moments,
            "linears": sorted(ref.name for ref in refs),
            "reduction": dict(reduction_key or {}),
        }
        store = CalibrationStore(cache, key)

    blocks = sorted({ref.block for ref in refs})
    kept: dict[str, Kept] = {}
    finished: set[int] = set()
    if store:
        finished = store.finished_blocks()
        for block in sorted(finished):
            kept.update(store.load(block))
    task = progress.add_task("calibrate", total=len(blocks), completed=len(finished)) if progress else None
    if finished < set(blocks):
        batches = samples.batches(batch_size, model.config.get_text_config().pad_token_id or 0)
        for block, statistics in stream_statistics(model, layout, batches, request, refs, skip=finished):
            with torch.no_grad():
                results = {layer.ref.name: _on_cpu(reduce(layer)) for layer in statistics}
            # Else these moments would live on while the next block's are summed.
            del statistics
            if store:
                store.save(block, results)
            kept.update(results)
            if progress and task is not None:
                progress.advance(task)
    return kept


def _below_the_head(config: PretrainedConfig) -> dict[str, Any]:
    """What the activations depend on beside weights and tokens: windows, activation functions, rotary bases."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in settings.items() if k not in NOT_OF_THE_BLOCKS and not k.startswith("_")}


def _on_cpu(kept: Kept) -> Kept:
    return {quantity: tensor.cpu() for quantity, tensor in kept.items()}
