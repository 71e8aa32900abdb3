"""How far a training is: one bar on a terminal, a plain line now and then elsewhere."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.launcher import is_main

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class ProgressReport(TrainerCallback):
    """Reports while it is entered: steps, loss and time left; scores as they come."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._on_terminal = console.is_terminal and is_main()
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not self._on_terminal
        )
        self._task = self._bar.add_task("")
        self._loss = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        self._bar.stop()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Learn how many steps there are, and where a resumed training goes on."""
        if state.global_step:
            log.info("training goes on from step %d", state.global_step)
        # Time left is estimated from this process's own steps.
        self._bar.reset(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance; without a terminal, write a line if the last one is long ago."""
        self._bar.update(self._task, completed=state.global_step)
        if not self._on_terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("step %d of %d%s", state.global_step, state.max_steps, self._loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss in the bar, and a line for the scores of an evaluation."""
        entry = logs or {}
        if "loss" in entry:
            self._loss = f", loss {entry['loss']:.4f}"
            self._bar.update(self._task, description=self._loss.removeprefix(", "))
        skipped = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        scores = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_") and k not in skipped}
        if scores:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            log.info("step %d of %d%s; on evaluation rows: %s", state.global_step, state.max_steps, self._loss, shown)
