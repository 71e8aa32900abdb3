"""Adapt and compress language models with low-rank methods, on shared spectral primitives."""

import sys

if sys.argv[:1] == ["-m"] and any("lowrank_kit" in word for word in sys.orig_argv) and not sys.flags.safe_path:
    # `python -m lowrank_kit.NAME` puts the working directory first: a file in a run's folder would pass for a library.
    del sys.path[0]

from lowrank_kit.models.registration import register_on_import

__version__ = "0.1.0"

# `AutoModelForCausalLM.from_pretrained` knows compressed checkpoints from here on; costs nothing until then.
register_on_import()
