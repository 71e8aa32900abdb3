"""OLoRA (Büyükakyüz, arXiv 2406.01775): an adapter that starts from the QR decomposition of W. By PEFT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank_kit.adapters.adapter import Adapter, Batches
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.errors import LowRankKitError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class Olora(Adapter):
    """B is the first r columns of Q, A the first r rows of R; the base keeps the rest."""

    takes_from_base: ClassVar[bool] = True

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        return {"init_lora_weights": "olora"}

    def wrap(
        self, model: "PreTrainedModel", config: "LoraConfig", kept: Mapping[str, Kept], batches: Batches
    ) -> "PeftModel":
        """See `Adapter`. Raises `LowRankKitError` for a model of Conv1D layers, whose weights PEFT would misread."""
        from peft import get_peft_model

        from lowrank_kit.models.linear import is_transposed

        if any(is_transposed(model.get_submodule(name)) for name in config.target_modules):
            raise LowRankKitError(
                f"PEFT's OLoRA does not know the Conv1D layers of a {model.config.model_type}: choose another method, "
                "for example pissa"
            )
        return get_peft_model(model, config)
