"""Adapt and compress language models with low-rank methods, on shared spectral primitives."""

from lowrank_kit.models.registration import register_on_import

__version__ = "0.1.0"

# `AutoModelForCausalLM.from_pretrained` knows compressed checkpoints from here on; costs nothing until then.
register_on_import()
