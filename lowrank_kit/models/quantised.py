"""Bases of 4 or 8 bits, which transformers loads through bitsandbytes, or writes and loads through torchao."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import ModelLayout

Quantisation = Literal["none", "nf4", "int8"]
Bits = Literal[4, 8]


def check_quantisation(kind: Quantisation, device: str) -> None:
    """Raise `ConfigError` where a base cannot be quantised: without the package, or without a CUDA device."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization={kind} needs the package bitsandbytes: pip install 'lowrank_kit[quantised]', or use "
            "model.quantization=none"
        )
    if not device.startswith("cuda"):
        raise ConfigError(f"model.quantization={kind} needs a CUDA device, not {device}: use model.quantization=none")


def loading_options(kind: Quantisation, dtype: torch.dtype, device: torch.device | str) -> dict[str, object]:
    """The arguments of `from_pretrained` that quantise the linears of the blocks; they compute in ``dtype``.

    ``nf4`` is NormalFloat with doubly quantised scales (QLoRA, arXiv 2305.14314), ``int8`` is LLM.int8() (arXiv
    2208.07339). A head is left as it is.
    """
    if kind == "none":
        return {}
    four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **four_bits}
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": torch.device(device)}}


def as_quantised(layout: ModelLayout) -> ModelLayout:
    """The layout that an unquantised model's will be once it is loaded quantised."""
    return replace(layout, linears=tuple(replace(ref, quantised=True) for ref in layout.linears))


def load_torchao(path: str, revision: str | None, bits: Bits, group: int, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model with quantised weights in its blocks, on any device; it computes in ``dtype``.

    Weights alone are quantised, symmetrically: of 8 bits with a scale an output, of 4 bits with one for every ``group``
    inputs. torchao keeps 4 bits in a byte each where a device has no kernel for packed ones, as a CPU has none.
    `save_pretrained` writes a checkpoint that transformers loads by itself.
    """
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    four_bits = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(group),
    )
    kind = TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else four_bits)
    return AutoModelForCausalLM.from_pretrained(
        path, revision=revision or "main", quantization_config=kind, dtype=dtype
    )


def check_torchao(layout: ModelLayout, bits: Bits, group: int) -> None:
    """Raise `ConfigError` where `load_torchao` cannot be: without the package, or for inputs that make no groups."""
    if find_spec("torchao") is None:
        raise ConfigError("a quantised base needs the package torchao: pip install 'lowrank_kit[quantised]'")
    for ref in layout.select():
        if bits == 4 and ref.in_features % group:
            legal = max(size for size in range(1, group) if ref.in_features % size == 0)
            raise ConfigError(f"{ref.name} has {ref.in_features} inputs, no groups of {group}: use --group {legal}")
