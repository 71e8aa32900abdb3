"""Content hashes of a model's weights."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Literal

from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.streamed import weights_of

Reads = Literal["blocks", "loss"]
"""What a number is read from: the blocks (hidden states, activations), or the loss, to which head and pooler belong."""


def fingerprint(model: PreTrainedModel, layout: ModelLayout, reads: Reads = "blocks") -> str:
    """Return a hash (32 hex digits) of the weights on which the blocks' activations, or the loss, depend.

    For ``blocks``, head and pooler are left out and names are those of the base model, so that models of one
    checkpoint with different or differently initialised heads agree.
    """
    left_out = layout.on_top if reads == "blocks" else ()
    stored = model.state_dict(keep_vars=True).keys()
    weights = {
        name.removeprefix(f"{model.base_model_prefix}."): (name, tensor)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if name in stored and not any(name.startswith(f"{top}.") for top in left_out)
    }
    # hashlib releases the interpreter lock, so threads hash weights side by side.
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda named: _digest(model, *named), weights.values()))
    whole = hashlib.blake2b(digest_size=16)
    for (name, (_, tensor)), digest in sorted(zip(weights.items(), digests, strict=True), key=lambda item: item[0][0]):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}\n".encode())
    return whole.hexdigest()


def _digest(model: PreTrainedModel, name: str, tensor: Tensor) -> str:
    from transformers.integrations.accelerate import load_offloaded_parameter

    held = weights_of(model).read(name)
    if held is None:
        # Of a model that is spread, what waits in memory or on disk until a forward pass needs it.
        held = load_offloaded_parameter(model, name) if tensor.is_meta else tensor
    values = held.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()
