"""MiCA (arXiv 2604.01694): updates confined to the minor left singular vectors of W. By PEFT."""

from typing import Any, Literal

from lowrank_kit.adapters.adapter import Adapter


class Mica(Adapter):
    """B is the r left singular vectors of smallest singular value and frozen; A starts at zero."""

    train: Literal["down"] = "down"
    """A alone learns."""

    @property
    def reads_floats(self) -> bool:
        """See `Adapter`."""
        return True

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        return {"init_lora_weights": "mica"}
