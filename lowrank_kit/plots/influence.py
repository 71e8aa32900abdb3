"""What every block was found to be worth, and which ones the plan chose."""

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowrank_kit.plots.figure import save


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
    figure = Figure(figsize=(2.5 + 0.2 * len(influence), 3.0), layout="constrained")
    panel = figure.subplots()
    parts = {"kept": [i for i in range(len(influence)) if i not in removed], chosen: sorted(removed)}
    for (label, blocks), colour in zip(parts.items(), ("tab:blue", "tab:orange"), strict=True):
        panel.bar(blocks, [influence[block] for block in blocks], color=colour, label=label)
    panel.set(xlabel="block", ylabel=quantity)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=7)
    save(figure, file)
    return figure
