"""LoRA+ (Hayou et al., arXiv 2402.12354): LoRA whose B learns faster than its A."""

from typing import Literal

from pydantic import Field

from lowrank_kit.adapters.adapter import Adapter


class LoraPlus(Adapter):
    """LoRA with two learning rates, in the groups of PEFT's ``create_loraplus_optimizer``."""

    train: Literal["both"] = "both"
    """Both factors learn, else there would be no ratio."""
    ratio: float = Field(default=16.0, ge=1)
    """Learning rate of B over `train.learning_rate`, which is that of A (section 5 of the paper: 16)."""

    @property
    def up_learning_rate_ratio(self) -> float:
        """See `Adapter`."""
        return self.ratio
