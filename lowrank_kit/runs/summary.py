"""The tables that a run prints at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.runs.published import Published

MAJORITY: Checkpoint = "majority_class"
SPEED = "speed"

Line = tuple[str, str]
Found = dict[tuple[str, str, Checkpoint], EvalRecord]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _ratio(final: float, dense: float) -> str:
    return f"{final / dense:.2f}"


def _difference(final: float, dense: float) -> str:
    return f"{100 * (final - dense):+.1f}"


@dataclass(frozen=True)
class _Unit:
    """How figures are written that stand beside the dense model's."""

    left: tuple[str, ...]
    """Headings of the task and, where there are several, of its metric."""
    figure: Callable[[float], str]
    error: Callable[[float], str]
    change: str
    changed: Callable[[float, float], str]
    counted: str


PERPLEXITY = _Unit(("perplexity of",), _number, "{:.2f}".format, "final / dense", _ratio, "windows")
SHARE = _Unit(("benchmark", "metric"), _percent, _percent, "final - dense", _difference, "rows")


def print_results(
    records: Sequence[EvalRecord], title: str, notes: Sequence[str] = (), published: Published | None = None
) -> None:
    """Print one line a task and metric.

    Labelled text: the final figure beside the majority class, in percent. Perplexity, benchmarks (in percent) and
    speed: the final figure beside the dense model's, and beside a paper's where ``published`` has one. Each kind has a
    table of its own, where there are records of it.
    """
    published = published or Published()
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
        console.print(_beside_dense(found, texts, title, published, PERPLEXITY))
    if answered:
        console.print(_beside_dense(found, answered, title, published, SHARE))
    if speeds:
        console.print(_speeds(found, speeds, f"{title}: speed"))
    if published.source and {(r.task, r.metric) for r in records} & {*published.dense, *published.final}:
        notes = [*notes, f"paper: {published.source}"]
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def _labelled(found: Found, lines: Sequence[Line], title: str) -> Table:
    table = _table(title, ("task", "metric"), ("majority", "early", "best", "final ± s.e.", "rows"))
    for task, metric in lines:
        final = found.get((task, metric, "final"))
        if final is None:
            continue
        cells = [_shown(found.get((task, metric, state)), _percent) for state in (MAJORITY, "early", "best")]
        error = "" if final.stderr is None else f" ± {_percent(final.stderr)}"
        table.add_row(task, metric, *cells, f"{_percent(final.value)}{error}", str(final.n))
    return table


def _beside_dense(found: Found, lines: Sequence[Line], title: str, published: Published, unit: _Unit) -> Table:
    # Only a recovered model has figures from before its recovery.
    recovered = any((*line, "compressed") in found for line in lines)
    states: list[Checkpoint] = ["dense", "compressed", "final"] if recovered else ["dense", "final"]
    papers = {
        head: of for head, of in (("paper, dense", published.dense), ("paper", published.final)) if {*lines} & {*of}
    }
    table = _table(title, unit.left, (*states, "± s.e.", unit.change, unit.counted, *papers))
    for task, metric in lines:
        dense, final = found.get((task, metric, "dense")), found.get((task, metric, "final"))
        # n is the same for all: they read the same windows, or answered the same rows.
        shown = final or dense
        if shown is None:
            continue
        error = "-" if shown.stderr is None else unit.error(shown.stderr)
        change = "-" if final is None or dense is None else unit.changed(final.value, dense.value)
        figures = [_shown(found.get((task, metric, state)), unit.figure) for state in states]
        figures += [error, change, str(shown.n)]
        figures += [unit.figure(of[task, metric]) if (task, metric) in of else "-" for of in papers.values()]
        table.add_row(*(task, metric)[: len(unit.left)], *figures)
    return table


def _speeds(found: Found, lines: Sequence[Line], title: str) -> Table:
    table = _table(title, ("measured",), ("dense", "final", "final / dense"))
    for task, metric in lines:
        dense, final = found.get((task, metric, "dense")), found.get((task, metric, "final"))
        ratio = "-" if final is None or dense is None else _ratio(final.value, dense.value)
        table.add_row(metric.replace("_", " "), _shown(dense, _number), _shown(final, _number), ratio)
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _shown(record: EvalRecord | None, figure: Callable[[float], str]) -> str:
    return "-" if record is None else figure(record.value)
