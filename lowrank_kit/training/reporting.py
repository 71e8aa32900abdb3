"""How far a training is: its bar, with the loss, and a line for every evaluation."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.progress import Bar, StageProgress

log = logging.getLogger(__name__)


class TrainingProgress(TrainerCallback):
    """Advances a bar with every optimiser step; scores are logged as they come."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress, self._loss = progress, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the bar from where a resumed training goes on."""
        if state.global_step:
            log.info("training goes on from step %d", state.global_step)
        self._bar = Bar(self._progress, "train", state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance."""
        self._bar.update(completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss with the bar, and a line for the scores of an evaluation."""
        entry = logs or {}
        if "loss" in entry:
            self._loss = f", loss {entry['loss']:.4f}"
            self._bar.update(description=f"train{self._loss}")
        skipped = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        scores = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_") and k not in skipped}
        if scores:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            log.info("step %d of %d%s; on evaluation rows: %s", state.global_step, state.max_steps, self._loss, shown)
