"""How many heads and channels every block keeps."""

from collections.abc import Mapping
from pathlib import Path

from lowrank_kit.plots.figure import Figure, integer_ticks, panels, save


def plot_kept_units(kept: Mapping[str, Mapping[int, float]], blocks: int, file: Path) -> Figure:
    """Draw the share kept of every kind of unit, by block, one panel a kind; a block that is not listed keeps all."""
    figure, axes = panels(len(kept))
    for (kind, shares), panel in zip(kept.items(), axes, strict=True):
        panel.bar(range(blocks), [shares.get(block, 1.0) for block in range(blocks)], color="tab:blue")
        panel.set(title=kind, xlabel="block", ylabel="share kept", ylim=(0, 1))
        integer_ticks(panel)
    save(figure, file)
    return figure
