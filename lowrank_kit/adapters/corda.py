"""CorDA (Yang et al., arXiv 2406.05223): an adapter from the SVD of W weighted by its inputs. By PEFT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowrank_kit.adapters.adapter import Adapter, Batches
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.deferred import torch

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class Corda(Adapter):
    """``s B A`` is made of components of ``U S V^T = SVD(W C)``, ``V^T C^-1`` on the right; the base keeps the rest.

    C is the second moment of the layer's inputs, as PEFT takes it: of every sample divided by its signed maximum.
    """

    takes_from_base: ClassVar[bool] = True
    rows_a_batch: ClassVar[int | None] = 1

    mode: Literal["ipm", "kpm"] = "ipm"
    """`ipm` (instruction-previewed): the r largest components of the task's own text. `kpm` (knowledge-preserved): the
    r smallest, of text whose knowledge is to stay."""

    @property
    def calibrates(self) -> bool:
        """See `Method`."""
        return True

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        from peft.tuners.lora.config import CordaConfig

        return {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=self.mode)}

    def wrap(
        self, model: "PreTrainedModel", config: "LoraConfig", kept: Mapping[str, Kept], batches: Batches
    ) -> "PeftModel":
        """See `Adapter`."""
        from peft import get_peft_model
        from peft.tuners.lora.corda import preprocess_corda

        @torch.no_grad()
        def run_model() -> None:
            for batch in batches:
                model(**{name: values for name, values in batch.items() if name != "labels"})

        preprocess_corda(model, config, run_model=run_model)
        return get_peft_model(model, config)
