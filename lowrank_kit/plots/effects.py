"""What an adapter did to a model: where its update lies along the training, and how far hidden states moved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_kit.plots.figure import Figure, integer_ticks, new_figure, panels, save


@dataclass(frozen=True)
class Share:
    """Fractions of an update's energy in the top and the tail directions at a step, and what chance would give."""

    step: int
    top: float
    tail: float
    chance: float


def plot_energy(shares: Mapping[str, Sequence[Share]], file: Path) -> Figure:
    """Draw the fractions over the steps, one panel a role; the dotted line is what random directions would hold."""
    figure, axes = panels(len(shares), sharey=True)
    for (role, measured), panel in zip(shares.items(), axes, strict=True):
        steps = [one.step for one in measured]
        panel.plot(steps, [one.top for one in measured], "o-", color="tab:red", label="top directions", markersize=4)
        panel.plot(steps, [one.tail for one in measured], "o-", color="tab:blue", label="tail directions", markersize=4)
        panel.plot(steps, [one.chance for one in measured], ":", color="grey", label="chance")
        panel.set(title=role, xlabel="step", ylabel="share of the update's energy")
        integer_ticks(panel)
    # The panels share their axis: a limit set before the last line is drawn would cut what comes after.
    axes[0].set_ylim(0, None)
    axes[0].legend(fontsize=7)
    save(figure, file)
    return figure


def plot_drift(moved: Sequence[float], file: Path) -> Figure:
    """Draw the relative change of the hidden states behind every block."""
    figure = new_figure(2.5 + 0.2 * len(moved), 3.0)
    panel = figure.subplots()
    panel.plot(range(len(moved)), moved, "o-", color="tab:blue", markersize=4)
    panel.set(xlabel="block", ylabel="relative change of hidden states", ylim=(0, None))
    integer_ticks(panel)
    save(figure, file)
    return figure
