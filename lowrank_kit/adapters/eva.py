"""EVA (Paischer et al., arXiv 2410.07170): A starts at the principal directions of a layer's inputs. By PEFT."""

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lowrank_kit.adapters.adapter import Adapter, Batches
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.deferred import torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.plan import Plan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# PEFT goes round the batches until all directions have settled, be it for ever; 300 rounds of two do happen.
MOST_ROUNDS = 1000


class Eva(Adapter):
    """A holds right singular vectors of the layer's inputs, found batch by batch; B starts at zero.

    PEFT updates a truncated SVD with every batch and stops where it settles, as published: unlike every other method's,
    its start depends on `calibration.batch_size`.
    Ranks move between matrices so that together they explain most variance; a matrix may end without an adapter.
    """

    train: Literal["both", "up"] = "both"
    """Which factors learn. `up` freezes A; B starts at zero and so has to learn."""
    rho: float = Field(default=2.0, ge=1)
    """A matrix may get up to so many times its configured rank; 1: ranks stay as configured."""
    tau: float = Field(default=0.99, ge=0, le=1)
    """A direction is found once its cosine from one batch to the next is so large."""

    @property
    def calibrates(self) -> bool:
        """See `Method`."""
        return True

    def alpha_of(self, rank: int) -> float:
        """In proportion to the rank, so that a matrix that got more of it is not scaled down (PEFT's default)."""
        return float(rank) if self.alpha is None else self.alpha * rank / self.rank

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        from peft.tuners.lora import EvaConfig

        return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=self.rho, tau=self.tau)}

    def collect(self, model: "PreTrainedModel", targets: Sequence[LinearRef], batches: Batches) -> dict[str, Kept]:
        """Find ``components [r, in]`` of every target, none for one that is to have no adapter.

        Raises `LowRankKitError` where no batch has as many tokens as directions are sought, and where they have not
        settled after `MOST_ROUNDS` rounds of all batches.
        """
        from peft import LoraConfig
        from peft.tuners.lora.eva import get_eva_state_dict

        ranks = {ref.name: self._configured_rank(ref) for ref in targets}
        sought = max(round(rank * self.rho) for rank in ranks.values())
        largest = max(int(batch["attention_mask"].sum()) for batch in batches)
        if largest < sought:
            raise LowRankKitError(
                f"EVA looks for {sought} directions (method.rho x rank) in every batch, and the largest calibration "
                f"batch has {largest} tokens: raise calibration.batch_size or calibration.samples, or lower method.rank"
            )
        config = LoraConfig(target_modules=sorted(ranks), r=self.rank, rank_pattern=ranks, **self.lora_options())
        passes = count()

        def forward(model: "PreTrainedModel", inputs: dict[str, Any]) -> None:
            rounds, batch = divmod(next(passes), len(batches))
            if rounds == MOST_ROUNDS:
                raise LowRankKitError(
                    f"EVA's directions have not settled after {MOST_ROUNDS} rounds of {len(batches)} calibration "
                    "batches: raise calibration.samples, or lower method.tau, method.rho or method.rank"
                )
            if batch == 0 and rounds and rounds % 25 == 0:
                log.info("EVA: %d rounds of %d batches, and not all directions have settled", rounds, len(batches))
            model(**inputs)

        found = get_eva_state_dict(model, batches, config, forward_fn=forward, show_progress_bar=False)
        return {name: {"components": components.cpu()} for name, components in found.items() if len(components)}

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """Every matrix has the rank that it got in calibration."""
        names = [ref.name for ref in self.targets(layout) if ref.name in kept]
        return self._plan_of(layout, {name: kept[name]["components"].shape[0] for name in names})

    def wrap(
        self, model: "PreTrainedModel", config: "LoraConfig", kept: Mapping[str, Kept], batches: Batches
    ) -> "PeftModel":
        """See `Adapter`."""
        from peft import get_peft_model

        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, found in kept.items():
                layer = wrapped.get_base_model().get_submodule(name)
                layer.lora_A["default"].weight.copy_(found["components"])
        return wrapped
