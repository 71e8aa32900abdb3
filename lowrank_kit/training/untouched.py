"""LoRA that subtracts its frozen initial product in the forward pass, so that the base weight stays as it was.

A variant of PEFT's LoRA layer rather than a second, negated adapter: checkpoints hold the one adapter, and
`set_adapter` (which the Trainer calls when it resumes) or `disable_adapter` cannot part the two.
"""

from typing import Any

from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from torch.nn import functional as F

from lowrank_kit.spectral.factors import LowRankFactors


class SubtractInitial(LoraVariant):
    """``y = W x + s (B A - B0 A0) x``, with B0 [out, r] and A0 [r, in] in buffers of the layer."""

    @classmethod
    def install(cls, layer: LoraLayer, adapter: str, initial: LowRankFactors) -> None:
        """Make ``adapter`` of ``layer`` subtract ``initial``."""
        weight = layer.lora_A[adapter].weight
        layer.register_buffer("initial_up", initial.up.to(weight), persistent=False)
        layer.register_buffer("initial_down", initial.down.to(weight), persistent=False)
        layer.lora_variant[adapter] = cls()

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's output less that of the initial product."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = x.to(down.weight.dtype)
        learned = up(down(module.lora_dropout[active_adapter](x)))
        initial = F.linear(F.linear(x, module.initial_down), module.initial_up)
        return result + module.scaling[active_adapter] * (learned - initial)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter in it."""
        return orig_weight + _difference(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Put the adapter into the weight in place."""
        orig_weight.data += _difference(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter taken out."""
        return orig_weight - _difference(module, active_adapter).to(orig_weight.dtype)


def _difference(module: LoraLayer, adapter: str) -> Tensor:
    """What merging adds, in the orientation in which the layer stores its weight."""
    initial = module.scaling[adapter] * module.initial_up @ module.initial_down
    return module.get_delta_weight(adapter) - (initial.T if module.fan_in_fan_out else initial)
