"""How far a long stage is: a bar with the time left on a terminal, a line now and then elsewhere."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowrank_kit.launcher import is_main

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class StageProgress(Progress):
    """Bars of description, M of N, time elapsed and time left; use it as a context manager, as any `Progress`.

    Without a terminal there are no bars: a bar that moves writes a line to the log if the last line is long ago.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._on_terminal = console.is_terminal and is_main()
        self._last_line = time.monotonic()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._on_terminal,
            # Some stages take a minute a step: the mean over the last hour tells more than that over 30 seconds.
            speed_estimate_period=3600.0,
        )

    def advance(self, task_id: TaskID, advance: float | int = 1) -> None:
        """As in `Progress`."""
        super().advance(task_id, advance)
        self._write_line(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As in `Progress`."""
        super().update(task_id, **changes)
        self._write_line(task_id)

    def _write_line(self, task_id: TaskID) -> None:
        if self._on_terminal or time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        task = self._tasks[task_id]
        left = "" if task.time_remaining is None else f", {clock(round(task.time_remaining))} left"
        total = "" if task.total is None else f" of {task.total:g}"
        log.info("%s: %g%s%s", task.description, task.completed, total, left)


class Bar:
    """One bar of a `Progress`: the way in which everything long shows how far it is. Without a `Progress`, nothing."""

    def __init__(
        self, progress: Progress | None, description: str, total: int | None = None, completed: int = 0
    ) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, completed=completed) if progress else TaskID(-1)

    def advance(self, steps: float | int = 1) -> None:
        """So many steps are done; may be a fraction."""
        if self._progress:
            self._progress.advance(self._task, steps)

    def update(self, **changes: Any) -> None:
        """As `Progress.update`: ``description``, ``total``, ``completed``."""
        if self._progress:
            self._progress.update(self._task, **changes)


def clock(seconds: int) -> str:
    """Return a time as `M:SS` or `H:MM:SS`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
