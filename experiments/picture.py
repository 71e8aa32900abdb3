"""Draw some arms of a study: perplexity over the size of the checkpoint in MB, large enough to be read on a phone.

python experiments/picture.py STUDY.results.json PICTURE.png [--text wikitext2] [--title TITLE] ARM[=NAME] ...

An arm whose NAME is given is one of ours and is drawn thicker. The size of the dense model is a checkpoint's size,
divided by the share of the model's parameters that it holds, which is right where both are in one number format.
"""

import argparse
import json
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lowrank_kit.plots.figure import new_figure, save
from lowrank_kit.runs.provenance import parse_study

INCHES = (6.4, 5.6)
POINTS = 13
"""Size of the letters: ten pixels of a phone, where the picture is 340 wide."""
LINE = 0.06
"""Height of a name, as a share of the panel's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--title")
    parser.add_argument("arms", nargs="+", metavar="ARM[=NAME]")
    options = parse_study(parser)
    rows, column = json.loads(options.results.read_text())["rows"], f"{options.text} perplexity"
    names = dict((arm.split("=") * 2)[:2] for arm in options.arms)
    points: dict[str, list[tuple[float, float]]] = {arm: [] for arm in names}
    for row in rows:
        if row["arm"] in names:
            points[row["arm"]].append((row["bytes"] / 1e6, row["figures"][column]["final"][0]))
    dense = (rows[0]["bytes"] / (1 - rows[0]["removed_of_model"]) / 1e6, rows[0]["figures"][column]["dense"][0])
    figure = new_figure(*INCHES)
    panel = figure.subplots()
    ends: dict[str, tuple[float, str]] = {}
    for number, (arm, pairs) in enumerate(points.items()):
        sizes, values = zip(dense, *sorted(pairs, reverse=True), strict=True)
        ours = names[arm] != arm
        panel.plot(sizes, values, f"C{number}", marker="o", markersize=7 if ours else 5, linewidth=3.5 if ours else 1.8)
        ends[names[arm]] = (values[-1], f"C{number}")
    panel.plot(*dense, "ko", markersize=8)
    panel.set(yscale="log", xlim=(min(s for pairs in points.values() for s, _ in pairs) - 10, dense[0] + 15))
    panel.annotate(
        f"dense: {dense[1]:.1f}",
        dense,
        (4, -21),
        textcoords="offset points",
        ha="right",
        fontsize=POINTS,
        color="black",
    )
    panel.set_ylim(bottom=0.68 * dense[1])
    panel.set_xlabel("size of the checkpoint in MB", fontsize=POINTS)
    panel.set_title(options.title or options.text, fontsize=POINTS + 1)
    panel.tick_params(labelsize=POINTS)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.tick_right()
    panel.grid(alpha=0.25)
    name_ends(panel, ends)
    save(figure, options.picture)


def name_ends(panel: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Write every name at the left, where its line ends, or as near to it as there is room."""
    least, most = panel.get_ylim()
    height = -1.0
    for name, (value, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        height = max(log(value / least) / log(most / least), height + LINE)
        panel.text(
            -0.02, height, name, color=colour, fontsize=POINTS, ha="right", va="center", transform=panel.transAxes
        )


if __name__ == "__main__":
    main()
