"""Bases of 4 or 8 bits, which transformers loads through bitsandbytes."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import ModelLayout

Quantisation = Literal["none", "nf4", "int8"]


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
