"""One training run: transformers.Trainer, resumable, and loud when the loss is lost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lowrank_kit.config import RuntimeConfig, TrainConfig
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.distributed import on_main
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import share
from lowrank_kit.launcher import started
from lowrank_kit.progress import StageProgress
from lowrank_kit.training.checkpoints import whole_checkpoint
from lowrank_kit.training.optimizer import adamw
from lowrank_kit.training.processes import make_whole, rows_per_pass, sharding
from lowrank_kit.training.reporting import TrainingProgress

LOGGING_STEPS = 10
# Renamed by transformers after 5.17.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
# Transformers' "constant" has no warm-up.
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

History = list[dict[str, float]]
Batch = Mapping[str, Any]
# Of the model, a pass, and the number of items in all passes of the step: the sum over the pass divided by that number.
Loss = Callable[[nn.Module, Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Examples:
    """Encoded rows to learn, and rows to evaluate on while training.

    ``collate`` makes a padded batch of rows. ``evaluation`` is scored every ``train.eval_every`` steps by ``score``, in
    batches of ``eval_batch_size`` rows; None: there is no evaluation while training.
    """

    rows: datasets.Dataset
    collate: Callable[[list[Any]], Any]
    evaluation: datasets.Dataset | None = None
    score: Callable[[EvalPrediction], dict[str, float]] | None = None
    eval_batch_size: int = 8


def _silent(metrics: Mapping[str, float], step: int) -> None:
    pass


@dataclass(frozen=True)
class Session:
    """Where one training takes place.

    ``folder`` holds its checkpoints; a whole one found there is continued from, and the caller removes the folder when
    the outcome is safe. ``seed`` draws the data order and the dropout. ``log`` is called with every log entry, its
    names as ``train/loss`` and ``eval/accuracy``, and its step. ``runtime`` says whether the processes shard the model.
    """

    folder: Path
    device: str
    seed: int
    log: Callable[[Mapping[str, float], int], None] = _silent
    runtime: RuntimeConfig = RuntimeConfig()  # noqa: RUF009, it is immutable


def fit(
    model: nn.Module,
    examples: Examples,
    settings: TrainConfig,
    session: Session,
    *,
    loss: Loss | None = None,
    optimizer: Callable[[TrainConfig], torch.optim.Optimizer] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> History:
    """Train whatever of ``model`` requires gradients, in place; return the Trainer's log, a dict an entry.

    Several processes that call this with the same arguments share every step's rows. What learnt is whole afterwards,
    as `make_whole` says.

    Args:
        model: on its device already.
        examples: what is learnt.
        settings: the schedule.
        session: where, and with which seed.
        loss: what falls; None: the model's own loss. Its items are tokens as `items_of` counts them.
        optimizer: makes the optimiser; None: AdamW at one learning rate.
        callbacks: called by the Trainer, after our own.

    Raises:
        LowRankKitError: the loss, the gradient or a metric is not finite.
    """
    set_seed(session.seed)
    device, evaluation = session.device, examples.evaluation
    mixed = _mixed_precision(settings, device)
    rows, passes = rows_per_pass(settings, started())
    arguments = TrainingArguments(
        output_dir=str(session.folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=examples.eval_batch_size,
        gradient_accumulation_steps=passes,
        **{_CHECKPOINTING: settings.gradient_checkpointing},
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=_SCHEDULERS[settings.scheduler],
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if settings.eval_every and evaluation is not None else "no",
        eval_steps=settings.eval_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 0,
        save_total_limit=1,
        logging_steps=LOGGING_STEPS,
        logging_first_step=True,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        # Processes that were told to be quiet stay so.
        log_level_replica="passive",
        bf16=mixed == "bf16",
        fp16=mixed == "fp16",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device.startswith("cuda"),
        seed=session.seed,
        report_to=[],
        # Of an adapter, all that learns is used in every pass.
        ddp_find_unused_parameters=False if isinstance(model, PeftModel) else None,
        **sharding(session.runtime),
    )
    # Else the configuration file of `accelerate launch` would decide.
    arguments.mixed_precision = "no" if mixed == "none" else mixed
    # The model is on its one device already; more that are visible are left to other runs.
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        loss,
        lambda: optimizer(settings) if optimizer else adamw(model, settings),
        settings.warmup_ratio,
        model=model,
        args=arguments,
        train_dataset=examples.rows,
        eval_dataset=evaluation,
        data_collator=examples.collate,
        compute_metrics=examples.score,
        # Encoder-decoders return hidden states beside them.
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        callbacks=[_Watcher(settings, session.log), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    with StageProgress() as progress:
        trainer.add_callback(TrainingProgress(progress))
        trainer.train(resume_from_checkpoint=on_main(lambda: whole_checkpoint(session.folder)))
    make_whole(model, trainer)
    return trainer.state.log_history


def _mixed_precision(settings: TrainConfig, device: str) -> str:
    if settings.mixed_precision != "auto":
        return settings.mixed_precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "none"


def items_of(labels: Tensor, shifted: bool) -> Tensor:
    """How many items a loss is the mean over: the rows of ``labels [rows]``, the labelled ones of ``[rows, tokens]``.

    ``shifted``: every token is predicted from those before it, so that the first of a row is never.
    """
    if labels.ndim == 1:
        return torch.tensor(len(labels))
    return (labels[:, 1:] if shifted else labels).ne(NOT_PREDICTED).sum()


class _Trainer(Trainer):
    """The Trainer, with an optimiser of one's own, and losses that are means over all items of an optimiser step.

    What transformers calls ``num_items_in_batch`` is counted here for every kind of loss: it counts none for
    classifiers and distillation, and for some model classes (GPT-2) the first token of every row too many.
    """

    def __init__(
        self, loss: Loss | None, optimizer: Callable[[], torch.optim.Optimizer], warmup: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self._loss, self._make_optimizer, self._warmup = loss or _own_loss, optimizer, warmup
        # What `compute_loss` returns is a part of the mean already.
        self.loss_is_scaled_for_ga = True
        self._shifts = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        evaluation = self.eval_dataset
        if evaluation is not None:
            labels = [torch.tensor([row]) for row in evaluation["labels"]]
            self._items_a_row = float(sum(items_of(one, self._shifts) for one in labels)) / len(labels)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make it when the Trainer is ready for it: sharding asks for that."""
        self.optimizer: torch.optim.Optimizer = self.optimizer or self._make_optimizer()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer, with the warm-up as a share of the steps; it would read a share of 1 as one step."""
        self.args.warmup_steps = math.ceil(num_training_steps * self._warmup)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The passes of a step, and the items in them, over all processes."""
        passes, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum((items_of(one["labels"], self._shifts) for one in passes), torch.tensor(0))
        # A step without any item has no loss, where 0 / 0 would be none.
        return passes, self.accelerator.gather(items.to(device)).sum().clamp(min=1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer, for all whom the umask allows."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            share(*Path(output_dir or self.args.output_dir).glob("*.safetensors"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The pass's part of the mean of its step; in evaluation, what makes the mean over rows that over all items."""
        if return_outputs:
            rows = torch.tensor(len(inputs["labels"]), device=self.args.device)
            outputs, loss = _outputs(model, inputs, self._items_a_row * rows)
            return loss, outputs
        # Gradients of several processes are averaged.
        return self._loss(model, inputs, num_items_in_batch / self.accelerator.num_processes)


def _own_loss(model: nn.Module, batch: Batch, items: Tensor) -> Tensor:
    return _outputs(model, batch, items)[1]


def _outputs(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Any, Tensor]:
    """What a model returns, and its own loss: the sum over the pass by ``items``."""
    if batch["labels"].ndim > 1:
        outputs = model(**batch, num_items_in_batch=items)
        return outputs, outputs["loss"]
    # The mean over the rows of the pass: classifiers of some families take no number of items.
    outputs = model(**batch)
    return outputs, outputs["loss"] * len(batch["labels"]) / items


class _Watcher(TrainerCallback):
    """Hands every log entry on, and ends a training whose loss is lost."""

    def __init__(self, settings: TrainConfig, log: Callable[[Mapping[str, float], int], None]) -> None:
        self._settings = settings
        self._log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name, value in (logs or {}).items():
            # float16's loss scale is found by trial: an overflowing gradient is skipped, not applied.
            if isinstance(value, float) and not math.isfinite(value) and not (args.fp16 and name == "grad_norm"):
                raise LowRankKitError(
                    f"training lost its way: {name} is {value} at step {state.global_step}; lower "
                    f"train.learning_rate (now {self._settings.learning_rate:g}), raise train.warmup_ratio, "
                    "or train in float32 (dtype=float32 train.mixed_precision=none)"
                )
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self._log({_grouped(name): value for name, value in numbers.items()}, state.global_step)


def _grouped(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
