"""Loss and evaluation loss along a training."""

from collections.abc import Sequence
from pathlib import Path

from lowrank_kit.plots.figure import PANEL_INCHES, Figure, integer_ticks, new_figure, save

Points = Sequence[tuple[int, float]]


def plot_loss(training: Points, evaluation: Points, file: Path) -> Figure:
    """Draw pairs of step and loss, in nats; ``evaluation`` may be empty."""
    figure = new_figure(*PANEL_INCHES)
    panel = figure.subplots()
    panel.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1, label="training")
    if evaluation:
        panel.plot(*zip(*evaluation, strict=True), "o-", color="tab:orange", markersize=4, label="evaluation")
        panel.legend(fontsize=7)
    panel.set(xlabel="step", ylabel="loss")
    integer_ticks(panel)
    save(figure, file)
    return figure
