"""LoRA-GA (Wang et al., arXiv 2407.05000): an adapter whose first step is nearest that of full fine-tuning. By PEFT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank_kit.adapters.adapter import Adapter, Batches
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class LoraGA(Adapter):
    """A and B start at singular vectors of the loss's gradient in W, whose product the base gives up."""

    takes_from_base: ClassVar[bool] = True

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the 2r leading singular vectors go into which factor."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """How large the factors start."""
    stable_gamma: int = Field(default=16, ge=1)
    """Of `scale=stable`: B is multiplied by out^1/4 / gamma^1/2."""

    @property
    def calibrates(self) -> bool:
        """See `Method`."""
        return True

    @property
    def reads_gradients(self) -> bool:
        """See `Method`."""
        return True

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        from peft.tuners.lora.config import LoraGAConfig

        settings = LoraGAConfig(direction=self.direction, scale=self.scale, stable_gamma=self.stable_gamma)
        return {"init_lora_weights": "lora_ga", "lora_ga_config": settings}

    def wrap(
        self, model: "PreTrainedModel", config: "LoraConfig", kept: Mapping[str, Kept], batches: Batches
    ) -> "PeftModel":
        """See `Adapter`. Raises `LowRankKitError` for a classifier whose samples have no labels."""
        from peft import get_peft_model

        from lowrank_kit.calibration.gradients import weight_gradients
        from lowrank_kit.calibration.next_token_loss import model_loss, next_token_loss
        from lowrank_kit.calibration.walk import BlockWalk
        from lowrank_kit.models.linear import is_transposed

        layout = layout_of(model)
        loss = next_token_loss if _is_causal(model) else model_loss
        batches = [batch if loss is next_token_loss else _labelled(model, batch) for batch in batches]
        # PEFT would average the batches' gradients, be a batch of few short rows or of many long ones.
        gradients = weight_gradients(BlockWalk(model, layout, batches), self.targets(layout), loss=loss)
        for name, gradient in gradients.items():
            module: Any = model.get_submodule(name)
            module._peft_loraga_grad = gradient.T if is_transposed(module) else gradient
        return get_peft_model(model, config)


def _is_causal(model: "PreTrainedModel") -> bool:
    return model.get_output_embeddings() is not None and not model.config.is_encoder_decoder


def _labelled(model: "PreTrainedModel", batch: dict[str, Tensor]) -> dict[str, Tensor]:
    from lowrank_kit.data.padding import NOT_PREDICTED

    if "labels" in batch:
        return batch
    if "Classification" in type(model).__name__:
        raise LowRankKitError(
            "LoRA-GA differentiates the loss of a classifier in its labels, and the calibration samples have none"
        )
    ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    return {**batch, "labels": torch.where(mask.bool(), ids, NOT_PREDICTED)}
