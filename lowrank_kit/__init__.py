"""Adapt and compress language models with low-rank methods, on shared spectral primitives."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and any("lowrank_kit" in word for word in sys.orig_argv) and not sys.flags.safe_path:
    # `python -m lowrank_kit.NAME` puts the working directory first: a file in a run's folder would pass for a library.
    del sys.path[0]

from lowrank_kit.models.registration import register_on_import

if TYPE_CHECKING:
    from lowrank_kit.interface import adapt, compress

__all__ = ["__version__", "adapt", "compress"]

__version__ = "0.2.0"

# `AutoModelForCausalLM.from_pretrained` knows compressed checkpoints from here on; costs nothing until then.
register_on_import()


def __getattr__(name: str) -> Any:
    # Imported when asked for: it stands on everything else.
    if name in ("adapt", "compress"):
        return getattr(import_module("lowrank_kit.interface"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
