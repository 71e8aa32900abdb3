"""What a method costs against what it leaves: quality over size, and over measured speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lowrank_kit.files import plain
from lowrank_kit.plots.figure import panels, save
from lowrank_kit.report.table import AVERAGE, SPEED, Column, Report, Row

# More panels than these nobody reads; an average stands for its benchmarks anyway.
MOST_PANELS = 8
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Axis:
    """What is laid along the x-axis; ``column`` None: parameters, in millions."""

    name: str
    label: str
    column: Column | None

    def value(self, row: Row) -> float | None:
        """Where a row stands, None if it was not measured."""
        if self.column is None:
            return None if row.parameters is None else row.parameters / 1e6
        return row.cells[self.column].mean if self.column in row.cells else None


def plot_pareto(report: Report, folder: Path) -> list[Path]:
    """Draw a figure for size and one for every measured speed, a panel a metric and a model: SVG files.

    A line joins the rows that no other one beats in both. What has no two points is not drawn.
    """
    axes = [
        Axis("size", "parameters (millions)", None),
        *(
            Axis(column.metric, column.metric.replace("_", " "), column)
            for column in report.columns
            if column.task == SPEED and column.metric.endswith("tokens_per_second")
        ),
    ]
    methods = sorted({row.method for block in report.blocks for row in block.rows})
    styles = {name: (MARKERS[number % len(MARKERS)], f"C{number % 10}") for number, name in enumerate(methods)}
    files = []
    # A name is a text, whatever signs are in it: no formula.
    with rc_context({"text.parse_math": False}):
        for axis in axes:
            everything = [
                (model, column, _rows(report, model, column, axis))
                for model in dict.fromkeys(block.model for block in report.blocks)
                for column in _quality(report.columns)
            ]
            drawn = [panel for panel in everything if len({axis.value(row) for row in panel[2]}) > 1][:MOST_PANELS]
            if drawn:
                figure, places = panels(len(drawn))
                for place, (model, column, rows) in zip(places, drawn, strict=True):
                    _panel(place, rows, axis, column, styles)
                    place.set_title(plain(model), fontsize=9)
                handles, names = [], []
                for place in places:
                    for handle, name in zip(*place.get_legend_handles_labels(), strict=True):
                        if name not in names:
                            handles.append(handle)
                            names.append(name)
                figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
                files.append(folder / f"pareto_{axis.name}.svg")
                save(figure, files[-1])
    return files


def front(points: Sequence[tuple[float, float]], small_x: bool, small_y: bool) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both and better in one, by rising x."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        good = [(p if small_x else -p, q if small_y else -q) for p, q in (a, b)]
        return good[0] != good[1] and good[0][0] <= good[1][0] and good[0][1] <= good[1][1]

    return sorted(p for p in set(points) if not any(beats(other, p) for other in points))


def _quality(columns: Sequence[Column]) -> list[Column]:
    averages = [column for column in columns if column.task == AVERAGE]
    quality = [column for column in columns if column.task != SPEED]
    return [c for c in quality if c.metric == "perplexity" or c in averages] if averages else quality


def _rows(report: Report, model: str, column: Column, axis: Axis) -> list[Row]:
    rows = [row for block in report.blocks if block.model == model for row in block.rows]
    return [row for row in rows if column in row.cells and axis.value(row) is not None]


def _panel(place: Axes, rows: Sequence[Row], axis: Axis, column: Column, styles: Mapping[str, tuple[str, str]]) -> None:
    scale = 100 if column.is_fraction else 1
    points = [(float(axis.value(row) or 0), scale * row.cells[column].mean, row) for row in rows]
    for method, (marker, color) in styles.items():
        if its := [(x, y) for x, y, row in points if row.method == method]:
            place.plot(*zip(*its, strict=True), marker, color=color, label=plain(method))
    best = front([(x, y) for x, y, _ in points], axis.column is None, column.lower_is_better)
    place.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, label="Pareto front")
    place.set(xlabel=axis.label, ylabel=plain(column.heading) + (" (%)" if column.is_fraction else ""))
    if column.metric == "perplexity":
        place.set_yscale("log")
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
