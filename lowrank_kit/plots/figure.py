"""What every plot shares: panels without pyplot's global state, and files that do not depend on the clock."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANEL_INCHES = (4.0, 3.0)
COLUMNS = 4


def panels(count: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``count`` panels of equal size, at most four in a row."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    size = (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1])
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat
    axes = list(grid)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def save(figure: Figure, file: Path) -> None:
    """Write the figure in the format of the file's suffix: png, svg or pdf. Equal figures give equal files."""
    clock = {".svg": "Date", ".pdf": "CreationDate"}.get(file.suffix)
    metadata = {"Software": None} if file.suffix == ".png" else {clock: None} if clock else None
    with rc_context({"svg.hashsalt": "lowrank_kit"}):
        figure.savefig(file, dpi=120, metadata=metadata)
