"""LoRA-GA (Wang et al., arXiv 2407.05000): an adapter whose first step is nearest that of full fine-tuning. By PEFT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.methods.base import Adapter, Batches

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
        """See `FineTuning`."""
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
        from peft.tuners.lora.loraga import preprocess_loraga

        batches = [_labelled(model, batch) for batch in batches]

        def train_step() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, train_step)
        return get_peft_model(model, config)


def _labelled(model: "PreTrainedModel", batch: dict[str, Tensor]) -> dict[str, Tensor]:
    from lowrank_kit.calibration.texts import NOT_PREDICTED

    if "labels" in batch:
        return batch
    if "Classification" in type(model).__name__:
        raise LowRankKitError(
            "LoRA-GA differentiates the loss of a classifier in its labels, and the calibration samples have none"
        )
    side = "decoder_" if model.config.is_encoder_decoder else ""
    ids, mask = batch[f"{side}input_ids"], batch[f"{side}attention_mask"]
    return {**batch, "labels": torch.where(mask.bool(), ids, NOT_PREDICTED)}
