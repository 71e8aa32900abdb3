"""LoRA (Hu et al., arXiv 2106.09685): A random, B zero, as PEFT initialises it."""

from typing import Literal

from lowrank_kit.adapters.adapter import Adapter


class Lora(Adapter):
    """Plain LoRA. The mathematics is PEFT's; this class only gives it a place on the common path."""

    train: Literal["both", "up"] = "both"
    """Which factors learn. `up` freezes A; B starts at zero and so has to learn."""
