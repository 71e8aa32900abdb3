"""How many heads and channels every block keeps."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowrank_kit.plots.figure import panels, save


def plot_kept_units(kept: Mapping[str, Mapping[int, float]], blocks: int, file: Path) -> Figure:
    """Draw the share kept of every kind of unit, by block, one panel a kind; a block that is not listed keeps all."""
    figure, axes = panels(len(kept))
    for (kind, shares), panel in zip(kept.items(), axes, strict=True):
        panel.bar(range(blocks), [shares.get(block, 1.0) for block in range(blocks)], color="tab:blue")
        panel.set(title=kind, xlabel="block", ylabel="share kept", ylim=(0, 1))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, file)
    return figure
