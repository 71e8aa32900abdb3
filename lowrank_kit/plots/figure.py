"""What every plot shares: panels without pyplot's global state, and files that do not depend on the clock.

Matplotlib is imported where something is drawn: a method's file can name its plots without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_kit.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any

PANEL_INCHES = (4.0, 3.0)
COLUMNS = 4


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(count: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``count`` panels of equal size, at most four in a row."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1])
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat
    axes = list(grid)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def integer_ticks(panel: Axes) -> None:
    """Let the ticks of the horizontal axis be integers."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Figure, file: Path) -> None:
    """Write the figure in the format of the file's suffix: png, svg or pdf. Equal figures give equal files."""
    from matplotlib import rc_context

    clock = {".svg": "Date", ".pdf": "CreationDate"}.get(file.suffix)
    metadata = {"Software": None} if file.suffix == ".png" else {clock: None} if clock else None
    with rc_context({"svg.hashsalt": "lowrank_kit"}):
        write_whole(file, lambda path: figure.savefig(path, dpi=120, metadata=metadata, format=file.suffix[1:]))
