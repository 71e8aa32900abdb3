"""One training run: transformers.Trainer, resumable, and loud when the loss is lost."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from transformers.trainer import TRAINER_STATE_NAME

from lowrank_kit.config import RuntimeConfig, TrainConfig
from lowrank_kit.distributed import on_main
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.launcher import started
from lowrank_kit.training.optimizer import adamw
from lowrank_kit.training.processes import make_whole, rows_per_pass, sharding
from lowrank_kit.training.progress import ProgressReport

LOGGING_STEPS = 10

History = list[dict[str, float]]
Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


def fit(
    model: nn.Module,
    train: datasets.Dataset,
    settings: TrainConfig,
    *,
    collate: Callable[[list[Any]], Any],
    folder: Path,
    device: str,
    seed: int,
    log: Callable[[Mapping[str, float], int], None],
    loss: Loss | None = None,
    optimizer: Callable[[TrainConfig], torch.optim.Optimizer] | None = None,
    evaluation: datasets.Dataset | None = None,
    eval_batch_size: int = 8,
    score: Callable[[EvalPrediction], dict[str, float]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008, it is immutable
) -> History:
    """Train whatever of ``model`` requires gradients, in place; return the Trainer's log, a dict an entry.

    Several processes that call this with the same arguments share every step's rows. What learnt is whole afterwards,
    as `make_whole` says.

    Args:
        model: on its device already.
        train: encoded rows.
        settings: the schedule.
        collate: makes a padded batch of rows.
        folder: checkpoints; a whole one found there is continued from. The caller removes it when the outcome is safe.
        device: where to train.
        seed: data order, dropout.
        log: called with every log entry, its names as ``train/loss`` and ``eval/accuracy``, and its step.
        loss: what falls, of the model and a batch; None: the model's own loss.
        optimizer: makes the optimiser; None: AdamW at one learning rate.
        evaluation: encoded rows, scored every ``settings.eval_every`` steps; None: no look while training.
        eval_batch_size: rows a forward pass in evaluation.
        score: metrics of predictions.
        callbacks: called by the Trainer, after our own.
        runtime: whether the processes shard the model.

    Raises:
        LowRankKitError: the loss, the gradient or a metric is not finite.
    """
    set_seed(seed)
    mixed = _mixed_precision(settings, device)
    rows, passes = rows_per_pass(settings, started())
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=settings.scheduler,
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
        seed=seed,
        report_to=[],
        # Of an adapter, all that learns is used in every pass.
        ddp_find_unused_parameters=False if isinstance(model, PeftModel) else None,
        **sharding(runtime),
    )
    # Else the configuration file of `accelerate launch` would decide.
    arguments.mixed_precision = "no" if mixed == "none" else mixed
    # The model is on its one device already; more that are visible are left to other runs.
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        loss,
        lambda: optimizer(settings) if optimizer else adamw(model, settings),
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate,
        compute_metrics=score,
        # Encoder-decoders return hidden states beside them.
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        callbacks=[_Watcher(settings, log), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    with ProgressReport() as report:
        trainer.add_callback(report)
        trainer.train(resume_from_checkpoint=on_main(lambda: _whole_checkpoint(folder)))
    make_whole(model, trainer)
    return trainer.state.log_history


def _mixed_precision(settings: TrainConfig, device: str) -> str:
    if settings.mixed_precision != "auto":
        return settings.mixed_precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "none"


def _whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that was finished; halves of others, left by a killed process, are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path)
    latest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if latest is None else str(latest)


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes its state file last, but not atomically.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


class _Trainer(Trainer):
    """The Trainer, with an optimiser of one's own, and perhaps a loss: the mean over a batch."""

    def __init__(self, loss: Loss | None, optimizer: Callable[[], torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(**options)
        self._loss, self._make_optimizer = loss, optimizer
        if loss is not None:
            self.loss_is_scaled_for_ga = False
        if not isinstance(self.train_dataset[0]["labels"], list):
            # Classifiers take the number of items among their keyword arguments and divide by the rows of the pass, so
            # that their loss would count once for every pass and process.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make it when the Trainer is ready for it: sharding asks for that."""
        self.optimizer: torch.optim.Optimizer = self.optimizer or self._make_optimizer()
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **options: Any) -> Any:
        """As the Trainer, unless there is a loss of one's own."""
        return (
            super().compute_loss(model, inputs, *args, **options) if self._loss is None else self._loss(model, inputs)
        )


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
