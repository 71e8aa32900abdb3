"""LoRA (Hu et al., arXiv 2106.09685): A random, B zero, as PEFT initialises it."""

from pydantic import model_validator

from lowrank_kit.methods.base import Adapter


class Lora(Adapter):
    """Plain LoRA. The mathematics is PEFT's; this class only gives it a place on the common path."""

    @model_validator(mode="after")
    def _can_learn(self) -> "Lora":
        if self.train == "down":
            raise ValueError("train=down would freeze B at zero, so nothing could learn; legal: both, up")
        return self
