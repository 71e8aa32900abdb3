"""What every block was found to be worth, and which ones the plan chose."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.table import Table

from lowrank_kit.plots.figure import Figure, integer_ticks, new_figure, save


def plot_influence(
    influence: Sequence[float],
    removed: Collection[int],
    file: Path,
    quantity: str = "block influence",
    chosen: str = "removed",
) -> Figure:
    """Draw one bar a block, those in ``removed`` in another colour that the legend calls ``chosen``.

    A block whose value is nan was not measured and has no bar.
    """
    figure = new_figure(2.5 + 0.2 * len(influence), 3.0)
    panel = figure.subplots()
    parts = {"kept": [i for i in range(len(influence)) if i not in removed], chosen: sorted(removed)}
    for (label, blocks), colour in zip(parts.items(), ("tab:blue", "tab:orange"), strict=True):
        panel.bar(blocks, [influence[block] for block in blocks], color=colour, label=label)
    panel.set(xlabel="block", ylabel=quantity)
    integer_ticks(panel)
    panel.legend(fontsize=7)
    save(figure, file)
    return figure


def influence_table(influence: Sequence[float], removed: Collection[int], chosen: str = "removed") -> Table:
    """One line a block: its influence, its place from the least, and whether it is in ``removed``.

    A block whose value is nan was not measured.
    """
    measured = [block for block in range(len(influence)) if not math.isnan(influence[block])]
    place = {block: n for n, block in enumerate(sorted(measured, key=lambda block: influence[block]), start=1)}
    table = Table("block", "influence", "from the least", "", title="block influence", title_justify="left")
    for block, value in enumerate(influence):
        cells = (f"{value:.4f}", str(place[block])) if block in place else ("-", "-")
        table.add_row(str(block), *cells, chosen if block in removed else "")
    return table
