"""Checkpoints of compressed models, which plain transformers loads: factored, or multiplied out again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import share
from lowrank_kit.models.architectures import base_type
from lowrank_kit.models.compressed import Classes, compressed_classes, stock_classes
from lowrank_kit.models.experts import pack, with_factors
from lowrank_kit.models.factored import factored_linears, pivot_rows_of, ranks_of, shared_downs
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import check_linear, is_transposed
from lowrank_kit.models.narrow import heads_by_block, narrower_than
from lowrank_kit.models.portable.entries import FORMAT
from lowrank_kit.models.rotate import sliced_layers
from lowrank_kit.models.rounded import rounded_linears, roundings_of
from lowrank_kit.models.streamed import Streamed, weights_of

# Entries of ``lowrank`` in every compressed checkpoint.
_NOTHING: dict[str, Any] = {"format": FORMAT, "ranks": {}, "shared_down": {}}
# What the class decides, not the model.
_OF_THE_CLASS = ("model_type", "architectures", "auto_map", "lowrank")


def save_compressed(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a causal language model, with its generation settings.

    Its linears may be `LowRankLinear`, rounded, or narrower than the stock ones, its decoder layers sliced or fewer.

    The checkpoint has its own ``model_type`` (``lowrank_llama``), so that code which does not know it fails instead
    of drawing random weights. It loads with ``import lowrank_kit``, and without us with ``trust_remote_code=True``.
    A model with nothing of that is written as the stock checkpoint that it is. ``folder`` appears whole or not at
    all; an earlier one is replaced. ``dtype`` None: the weights as they are.

    Raises `LowRankKitError` for a model that is no causal language model of transformers, and for weights that are not
    finite, be it in ``dtype`` alone.
    """
    listed = with_factors(model)
    twin, source = _empty_twin(model, _factors(model, listed)), weights_of(model)
    if isinstance(source, Streamed):
        source.finish(twin, folder, tokenizer)
        return
    weights = model.state_dict()
    pack(weights, model, listed)
    _save(twin, weights, folder, tokenizer, max_shard_size, dtype)


@torch.no_grad()
def save_dense(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Multiply every factored or rounded linear out, in float64, and write the checkpoint, rounded to ``dtype``.

    It is a stock one unless the model is pruned or sliced: irregular shapes fit no stock class. Embeddings tied to
    the head stay tied. Otherwise as `save_compressed`.
    """
    weights, twin = model.state_dict(), _empty_twin(model, {"ranks": {}, "shared_down": {}, "experts": []})
    own = {ref.name for ref in layout_of(twin).linears if not ref.packed}
    factored = dict(factored_linears(model))
    rounded = {name: layer for name, layer in rounded_linears(model) if name.rpartition(".")[0] not in factored}
    for name, layer in (factored | rounded).items():
        stored = {key: weights.pop(key) for key in layer.state_dict(prefix=f"{name}.")}
        weight = layer.dense_weight().to(dtype or next(t.dtype for t in stored.values() if t.is_floating_point()))
        transposed = name in own and is_transposed(check_linear(twin.get_submodule(name), name))
        weights[f"{name}.weight"] = weight.T.contiguous() if transposed else weight
        if (bias := layer.dense_bias()) is not None:
            weights[f"{name}.bias"] = bias
    pack(weights, model, ())
    _save(twin, weights, folder, tokenizer, max_shard_size, dtype)


def as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `save_compressed` and `from_pretrained` would give it back, on the same weights.

    It has the class of its checkpoint, so that its own ``save_pretrained`` writes a whole one. Errors as for
    `save_compressed`.
    """
    listed, weights, buffers = with_factors(model), model.state_dict(), dict(model.named_buffers())
    twin = _empty_twin(model, _factors(model, listed))
    pack(weights, model, listed)
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    for name, buffer in twin.named_buffers():
        if buffer.is_meta:
            # Computed when a model is built, and not stored: rotary frequencies.
            owner, _, last = name.rpartition(".")
            twin.get_submodule(owner).register_buffer(last, buffers[name], persistent=False)
    return twin.train(model.training)


def _factors(model: PreTrainedModel, listed: list[str]) -> dict[str, Any]:
    return {
        "ranks": ranks_of(model),
        "shared_down": shared_downs(model),
        "pivot_rows": pivot_rows_of(model),
        "rounded": roundings_of(model),
        "experts": listed,
    }


def _empty_twin(model: PreTrainedModel, factors: dict[str, Any]) -> PreTrainedModel:
    """The model as its checkpoint's own class builds it, on the meta device: the stock class if nothing is unusual.

    ``factors`` are its ranks, shared factors and listed experts; other things unusual are read off the model.
    """
    original = base_type(model.config.model_type)
    _, stock_model = stock_classes(original)
    if not isinstance(model, stock_model):
        raise LowRankKitError(
            f"only causal language models are saved compressed: this is a {type(model).__name__}, not a "
            f"{stock_model.__name__}"
        )
    # Of the compressed class: a stock configuration refuses some sliced hidden sizes.
    plain = _build(model, compressed_classes(original), {"lowrank": _NOTHING})
    unusual = {"shapes": narrower_than(model, plain), "shortcuts": sliced_layers(model)}
    found = {key: _below(value, plain.base_path) for key, value in (factors | unusual).items() if value}
    if not found:
        return _build(model, stock_classes(original), {})
    more: dict[str, Any] = {"lowrank": _NOTHING | found}
    heads = heads_by_block(model, plain)
    if heads and model.config.get_text_config() is model.config:
        # Stock code reads the global number for what no layer changes, such as how many queries share a key.
        more |= {"per_layer_config": heads, "allow_global_per_layer_attribute_access": True}
    return _build(model, compressed_classes(original), more)


def _below(entry: Any, base: str) -> Any:
    """An entry whose names of modules, wherever they stand, are relative to the module ``base``."""
    if isinstance(entry, dict):
        return {_below(name, base): _below(value, base) for name, value in entry.items()}
    if isinstance(entry, list):
        return [_below(value, base) for value in entry]
    return entry.removeprefix(f"{base}.") if isinstance(entry, str) else entry


def _build(model: PreTrainedModel, classes: Classes, more: dict[str, Any]) -> PreTrainedModel:
    config_class, model_class = classes
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_CLASS}
    with torch.device("meta"):
        twin = model_class(config_class.from_dict(settings | more))
    twin.generation_config = model.generation_config
    return twin


def _save(
    twin: PreTrainedModel,
    weights: Mapping[str, Tensor],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    dtype: torch.dtype | None,
) -> None:
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    for name, parameter in twin.named_parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
        if not bool(parameter.isfinite().all()):
            raise LowRankKitError(
                f"{name} holds numbers that are not finite{f' in {dtype}' if dtype else ''}: nothing is written; use "
                "weights that are whole, or another number format"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the target: a rename is atomic only within one file system.
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary, "whole")
        twin.save_pretrained(whole, max_shard_size=max_shard_size)
        share(*whole.glob("*.safetensors"))
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        shutil.rmtree(folder, ignore_errors=True)
        whole.replace(folder)
