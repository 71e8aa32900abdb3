"""Draw some arms of a study on one text: the picture at the top of the README.

python experiments/picture.py STUDY.results.json PICTURE.png [--text wikitext2] [--title TITLE] ARM[=NAME] ...
"""

import argparse
import json
from pathlib import Path

from lowrank_kit.plots.ratio import plot_loss_against_ratio
from lowrank_kit.runs.provenance import parse_study


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
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for row in rows:
        if row["arm"] in names:
            points[names[row["arm"]]].append((100 * row["removed"], row["figures"][column]["final"][0]))
    dense = rows[0]["figures"][column]["dense"][0]
    title = options.title or options.text
    plot_loss_against_ratio({title: points}, options.picture, {title: dense}, "% of the linears' parameters removed")


if __name__ == "__main__":
    main()
