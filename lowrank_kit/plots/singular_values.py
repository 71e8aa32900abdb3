"""Spectra by role, one line a block."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank_kit.models.layout import LinearRef
from lowrank_kit.plots.figure import Figure, panels, save


def plot_spectra(
    refs: Sequence[LinearRef], values: Mapping[str, Sequence[float]], file: Path, quantity: str = "singular value"
) -> Figure:
    """Draw descending ``values[name]`` of every linear that has them, relative to its largest one, on log axes.

    One panel a role; the colour of a line is its block, dark for the first. Zeros have no place on a log axis and
    are left out.
    """
    shown = [ref for ref in refs if ref.name in values]
    roles = list(dict.fromkeys(ref.role for ref in shown))
    last = max(ref.block for ref in shown)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depth = ScalarMappable(Normalize(0, last or 1), colormaps["viridis"])
    colours = depth.to_rgba(np.arange(last + 1))
    figure, axes = panels(len(roles), sharey=True)
    for role, panel in zip(roles, axes, strict=True):
        for ref in (ref for ref in shown if ref.role == role):
            line = [value / values[ref.name][0] for value in values[ref.name] if value > 0]
            panel.plot(range(1, len(line) + 1), line, color=colours[ref.block], linewidth=0.8)
        panel.set(title=role, xscale="log", yscale="log", xlabel="index")
    axes[0].set_ylabel(f"{quantity} / largest")
    figure.colorbar(depth, ax=axes, label="block")
    save(figure, file)
    return figure
