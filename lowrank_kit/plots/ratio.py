"""Loss against the fraction of parameters removed, one line a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_kit.plots.figure import Figure, panels, save


def plot_loss_against_ratio(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    file: Path,
    dense: Mapping[str, float] | None = None,
    quantity: str = "perplexity",
) -> Figure:
    """Draw ``points[text][method]``, pairs of ratio and value, on a log axis; one panel a text.

    ``dense[text]`` is the value of the model as it came, a dashed line.
    """
    figure, axes = panels(len(points))
    for (text, methods), panel in zip(points.items(), axes, strict=True):
        for method, pairs in methods.items():
            ratios, values = zip(*sorted(pairs), strict=True)
            panel.plot(ratios, values, marker="o", markersize=4, label=method)
        if dense is not None and text in dense:
            panel.axhline(dense[text], color="black", linestyle="--", linewidth=0.8, label="dense")
        panel.set(title=text, xlabel="fraction of decoder-linear parameters removed", ylabel=quantity, yscale="log")
        panel.legend(fontsize=7)
    save(figure, file)
    return figure
