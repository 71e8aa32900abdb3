"""Full fine-tuning: no adapter; all weights learn, or those of some roles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.config import TrainConfig
from lowrank_kit.files import share
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.optimizer import adamw


@dataclass(frozen=True)
class FullyTrained:
    """A model whose own weights learn, in float32; ``new_modules`` are those that started at random.

    ``dtype`` is what the model came in, and goes out in.
    """

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    dtype: torch.dtype

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that learn, a newly initialised head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def optimizer(self, settings: TrainConfig) -> torch.optim.Optimizer:
        """AdamW; newly initialised modules may learn faster."""
        return adamw(self.model, settings, new=self.new_modules)

    def export(self, folder: Path, base: str) -> None:
        """Write a checkpoint of transformers and round the model as it is; ``base`` is not needed to load it."""
        self.model.to(self.dtype).save_pretrained(folder)
        share(*folder.glob("*.safetensors"))


def unfreeze(model: PreTrainedModel, method: FullFineTuning, new_modules: Sequence[str]) -> FullyTrained:
    """Let the chosen weights of ``model`` learn, with their biases, and ``new_modules``; the rest is frozen.

    The whole model is made float32, for steps that are small beside a weight are rounded away in half precision.
    """
    dtype = model.dtype
    model.float()
    model.requires_grad_(method.roles is None)
    for name in (*(ref.name for ref in method.targets(layout_of(model))), *new_modules):
        model.get_submodule(name).requires_grad_(True)
    return FullyTrained(model, tuple(new_modules), dtype)
