"""Loss against the size that is left, one line a method."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

from lowrank_kit.plots.figure import Axes, Figure, panels, save

HIGHEST = 50
"""Times the loss of the dense model: what lies above has its figure beside its name and is not drawn to scale."""
LINE = 0.062
"""Height of a name, as a share of a panel's."""
STYLES = ("-", "--", "-.")


def plot_loss_against_ratio(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    file: Path,
    dense: Mapping[str, float],
    size: str = "fraction of decoder-linear parameters removed",
    quantity: str = "perplexity",
) -> Figure:
    """Draw ``points[text][method]``, pairs of size and value, on a log axis; one panel a text.

    ``dense[text]`` is the value of the model as it came, a dotted line. Names stand at the right end of their lines.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = panels(len(points))
    for (text, methods), panel in zip(points.items(), axes, strict=True):
        least, most = 0.9 * dense[text], HIGHEST * dense[text]
        ends: dict[str, float] = {}
        for number, (method, pairs) in enumerate(methods.items()):
            sizes, values = zip(*sorted(pairs), strict=True)
            style = STYLES[number // 10 % len(STYLES)]
            panel.plot(sizes, values, f"C{number % 10}{style}", marker="o", markersize=3, linewidth=1.2)
            ends[method] = values[-1]
        panel.axhline(dense[text], color="black", linestyle=":", linewidth=0.8)
        panel.set(title=text, xlabel=size, ylabel=quantity, yscale="log", ylim=(least, most))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        _name(panel, ends | {"dense": dense[text]}, [*(f"C{n % 10}" for n in range(len(methods))), "black"])
    save(figure, file)
    return figure


def _name(panel: Axes, ends: Mapping[str, float], colours: Sequence[str]) -> None:
    """Write every name where its line ends, or as near to it as there is room."""
    least, most = panel.get_ylim()
    named = sorted(zip(ends.items(), colours, strict=True), key=lambda entry: entry[0][1])
    heights: list[float] = []
    for (_, value), _ in named:
        height = min(log(value / least) / log(most / least), 1.0)
        heights.append(max(height, heights[-1] + LINE) if heights else height)
    for above in range(len(heights) - 1, -1, -1):
        room = heights[above + 1] - LINE if above + 1 < len(heights) else 1.0
        heights[above] = min(heights[above], room)
    for ((name, value), colour), height in zip(named, heights, strict=True):
        text = f"{name} ({value:.0e})" if value > most else name
        panel.text(1.02, height, text, color=colour, fontsize=7, va="center", transform=panel.transAxes)
