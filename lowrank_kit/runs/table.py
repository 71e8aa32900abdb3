"""The table that a run prints at its end."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lowrank_kit.evaluation.records import Checkpoint, EvalRecord

MAJORITY: Checkpoint = "majority_class"


def print_results(records: Sequence[EvalRecord], title: str, notes: Sequence[str] = ()) -> None:
    """Print one line a task and metric: the final figure beside the majority class, in percent."""
    table = Table(title=title, title_justify="left")
    for heading in ("task", "metric", "majority", "first look", "best look", "final ± s.e.", "rows"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    found = {(r.task, r.metric, r.checkpoint): r for r in records}
    for task, metric in dict.fromkeys((r.task, r.metric) for r in records):
        final = found.get((task, metric, "final"))
        if final is None:
            continue
        cells = [_percent(found.get((task, metric, state))) for state in (MAJORITY, "early", "best")]
        error = "" if final.stderr is None else f" ± {100 * final.stderr:.1f}"
        table.add_row(task, metric, *cells, f"{_percent(final)}{error}", str(final.n))
    # Wide enough for every column: a table in a log file must not be cut to the width of no terminal.
    console = Console(width=max(100, Console().width))
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def _percent(record: EvalRecord | None) -> str:
    return "-" if record is None else f"{100 * record.value:.1f}"
