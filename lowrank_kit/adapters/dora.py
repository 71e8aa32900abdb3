"""DoRA (Liu et al., arXiv 2402.09353): magnitude and direction of W + s B A learn apart. By PEFT."""

from typing import Any, Literal

from lowrank_kit.adapters.adapter import Adapter
from lowrank_kit.models.layout import LinearRef


class Dora(Adapter):
    """LoRA on the direction of every row of W, and a learned magnitude [out] beside it."""

    train: Literal["both", "up"] = "both"
    """Which factors learn. `up` freezes A; B starts at zero and so has to learn. The magnitudes always do."""

    def trained_by(self, ref: LinearRef, rank: int) -> int:
        """See `Adapter`; the magnitudes count."""
        return super().trained_by(ref, rank) + ref.out_features

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        return {"use_dora": True}
