"""The tables that a run prints at its end."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lowrank_kit.evaluation.records import Checkpoint, EvalRecord

MAJORITY: Checkpoint = "majority_class"
SPEED = "speed"

Found = dict[tuple[str, str, Checkpoint], EvalRecord]


def print_results(records: Sequence[EvalRecord], title: str, notes: Sequence[str] = ()) -> None:
    """Print one line a task and metric.

    Labelled text: the final figure beside the majority class, in percent. Perplexity, benchmarks (in percent) and
    speed: the final figure beside the dense model's. Each kind has a table of its own, where there are records of it.
    """
    # Wide enough for every column: a table in a log file must not be cut to the width of no terminal.
    console = Console(width=max(100, Console().width))
    found = {(r.task, r.metric, r.checkpoint): r for r in records}
    lines = dict.fromkeys((r.task, r.metric) for r in records)
    texts = [(task, metric) for task, metric in lines if metric == "perplexity"]
    speeds = [(task, metric) for task, metric in lines if task == SPEED]
    # Answered by way of lm-eval, and nothing else is.
    answered = [line for line in lines if any("lm_eval" in r.versions for r in records if (r.task, r.metric) == line)]
    labelled = [line for line in lines if line not in (*texts, *speeds, *answered)]
    if labelled:
        console.print(_labelled(found, labelled, title))
    if texts:
        console.print(_perplexities(found, texts, title))
    if answered:
        console.print(_benchmarks(found, answered, title))
    if speeds:
        console.print(_speeds(found, speeds, f"{title}: speed"))
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def _labelled(found: Found, lines: Sequence[tuple[str, str]], title: str) -> Table:
    table = _table(title, ("task", "metric"), ("majority", "first look", "best look", "final ± s.e.", "rows"))
    for task, metric in lines:
        final = found.get((task, metric, "final"))
        if final is None:
            continue
        cells = [_percent(found.get((task, metric, state))) for state in (MAJORITY, "early", "best")]
        error = "" if final.stderr is None else f" ± {100 * final.stderr:.1f}"
        table.add_row(task, metric, *cells, f"{_percent(final)}{error}", str(final.n))
    return table


def _perplexities(found: Found, lines: Sequence[tuple[str, str]], title: str) -> Table:
    # Only a recovered model has figures from before its recovery.
    recovered = any(state == "compressed" for _, _, state in found)
    states: list[Checkpoint] = ["dense", "compressed", "final"] if recovered else ["dense", "final"]
    table = _table(title, ("perplexity of",), (*states, "± s.e.", "final / dense", "windows"))
    for task, metric in lines:
        dense, final = found.get((task, metric, "dense")), found.get((task, metric, "final"))
        # n is the same for both: they read the same windows.
        shown = final or dense
        if shown is None:
            continue
        error = "-" if shown.stderr is None else f"{shown.stderr:.2f}"
        figures = [_number(found.get((task, metric, state))) for state in states]
        table.add_row(task, *figures, error, _ratio(final, dense), str(shown.n))
    return table


def _benchmarks(found: Found, lines: Sequence[tuple[str, str]], title: str) -> Table:
    states: list[Checkpoint] = [s for s in ("dense", "compressed", "final") if any(s == state for *_, state in found)]
    table = _table(title, ("benchmark", "metric"), (*states, "± s.e.", "final - dense", "rows"))
    for task, metric in lines:
        dense, final = found.get((task, metric, "dense")), found.get((task, metric, "final"))
        # n is the same for all: they answered the same rows.
        shown = final or dense
        if shown is None:
            continue
        error = "-" if shown.stderr is None else f"{100 * shown.stderr:.1f}"
        change = "-" if final is None or dense is None else f"{100 * (final.value - dense.value):+.1f}"
        figures = [_percent(found.get((task, metric, state))) for state in states]
        table.add_row(task, metric, *figures, error, change, str(shown.n))
    return table


def _speeds(found: Found, lines: Sequence[tuple[str, str]], title: str) -> Table:
    table = _table(title, ("measured",), ("dense", "final", "final / dense"))
    for task, metric in lines:
        dense, final = found.get((task, metric, "dense")), found.get((task, metric, "final"))
        table.add_row(metric.replace("_", " "), _number(dense), _number(final), _ratio(final, dense))
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _percent(record: EvalRecord | None) -> str:
    return "-" if record is None else f"{100 * record.value:.1f}"


def _number(record: EvalRecord | None) -> str:
    if record is None:
        return "-"
    return f"{record.value:,.2f}" if record.value < 1000 else f"{record.value:,.0f}"


def _ratio(final: EvalRecord | None, dense: EvalRecord | None) -> str:
    return "-" if final is None or dense is None else f"{final.value / dense.value:.2f}"
