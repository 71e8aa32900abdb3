"""Recovery: what a compression has replaced in a model is trained briefly, and nothing else, to win quality back."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from lowrank_kit.config import RecoveryConfig, TrainConfig
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.factored import shared_downs
from lowrank_kit.models.layout import LinearRef, ModelLayout, layout_of
from lowrank_kit.training.adapters import Adapted
from lowrank_kit.training.fit import Batch, Examples, History, Session, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What was trained, the model itself or a PEFT model around it, and the Trainer's log."""

    learnt: nn.Module
    trained_parameters: int
    history: History

    def merged(self) -> PreTrainedModel:
        """The model, of the same shapes as before, with LoRA in its weights; what was trained is changed."""
        model = self.learnt.merge_and_unload() if isinstance(self.learnt, PeftModel) else self.learnt
        return model.eval()


def learner(model: PreTrainedModel, settings: RecoveryConfig) -> nn.Module:
    """Return what `recover` trains of ``settings.what``: the model itself with gradients there, or a PEFT model.

    `factors`: all of the replaced blocks but their dense linears, that is factors and norms (GRASP, arXiv 2501.00339).
    `lora`: LoRA on their linears, of a factored one on each half, so that merging it keeps the rank; a ``down`` weight
    that several linears share is left alone. ``model`` is changed in place.

    Raises `LowRankKitError` for `factors` where no linear is factored.
    """
    layout = layout_of(model)
    model.requires_grad_(False)
    if settings.what == "lora":
        targets = [part for ref in replaced_linears(layout) for part in _parts(ref, shared_downs(model))]
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=settings.rank, lora_alpha=settings.alpha)
        return get_peft_model(model, config)
    if all(ref.rank is None for ref in layout.linears):
        raise LowRankKitError(
            "no linear of the compressed model is factored, so there are no factors to train: use recovery=lora"
        )
    dense = {ref.name for ref in layout.linears if ref.rank is None}
    for block in {layout.blocks[ref.block] for ref in replaced_linears(layout)}:
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            parameter.requires_grad = name.rpartition(".")[0] not in dense
    return model


def replaced_linears(layout: ModelLayout) -> list[LinearRef]:
    """The linears of every block that has a factored one; of a model without any, all linears."""
    blocks = {ref.block for ref in layout.linears if ref.rank is not None}
    return [ref for ref in layout.linears if ref.block in blocks or not blocks]


def recover(
    model: PreTrainedModel,
    examples: Examples,
    settings: RecoveryConfig,
    schedule: TrainConfig,
    session: Session,
    *,
    adapted: Adapted | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Recovered:
    """Train a compressed model.

    Args:
        model: compressed, on its device, in float32; changed in place.
        examples: rows with ``input_ids`` and ``labels``, where -100 is not learnt.
        settings: what learns, and from which loss.
        schedule: steps, learning rate.
        session: where, and the seed, which draws the start of LoRA too.
        adapted: ``model`` with the adapter to train, for ``what=adapter``; else None, and `learner` decides.
        teacher: the original model on the same device, for ``loss=distill``: its weights stay in memory throughout.
        callbacks: of the Trainer.

    Raises:
        LowRankKitError: of `learner` and of `fit`.
    """
    torch.manual_seed(session.seed)
    learning = adapted.model if adapted else learner(model, settings)
    trained = sum(p.numel() for p in learning.parameters() if p.requires_grad)
    log.info("recovery trains %s parameters on %d rows", f"{trained:,}", len(examples.rows))
    history = fit(
        learning,
        examples,
        schedule,
        session,
        optimizer=adapted.optimizer if adapted else None,
        loss=None if teacher is None else partial(_distil, teacher.eval()),
        callbacks=callbacks,
    )
    return Recovered(learning, trained, history)


def distillation_loss(
    ours: Float[Tensor, "rows tokens vocabulary"],
    theirs: Float[Tensor, "rows tokens vocabulary"],
    labels: Int64[Tensor, "rows tokens"],
) -> Float[Tensor, ""]:
    """Sum of KL(theirs || ours) over the positions whose next token has a label, in nats, from logits in float32."""
    predicted = labels[:, 1:] != NOT_PREDICTED
    log_p, log_q = (logits[:, :-1][predicted].float().log_softmax(-1) for logits in (theirs, ours))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _distil(teacher: PreTrainedModel, model: nn.Module, batch: Batch, items: Tensor) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = teacher(**inputs).logits
    return distillation_loss(model(**inputs).logits, theirs, batch["labels"]) / items


def _parts(ref: LinearRef, shared: Mapping[str, str]) -> list[str]:
    """The modules of a linear that carry LoRA."""
    parts = ref.parts[-1:] if ref.name in {*shared, *shared.values()} else ref.parts
    return [part.name for part in parts]
