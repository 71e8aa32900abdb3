"""Lay any runs out in one table: terminal, Markdown, LaTeX, CSV, and an HTML page that needs no network."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowrank_kit.config.plugins import let_here
from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR",
        help="folder for report.html, report.md, table.tex, table.csv and the plots (default: report)",
    )  # fmt: skip
    parser.add_argument("--level", type=float, default=0.05, help="of significance, for bold (default: 0.05)")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="KEY",
        help="settings that make no row of their own, such as train.learning_rate where it is chosen for each task",
    )  # fmt: skip
    parser.add_argument(
        "--method-prefixes", nargs="+", default=[], metavar="PACKAGE",
        help="packages of your own methods, which may be imported; what a run names itself is not",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    let_here(options.method_prefixes)
    try:
        _report(options.runs, options.output, options.level, options.ignore, options.method_prefixes)
    except Exception as error:
        return explained(error)
    return 0


def _report(folders: Sequence[Path], output: Path, level: float, ignored: Sequence[str], named: Sequence[str]) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"--level {level} is not between 0 and 1")
    # Imported only now: a wrong command is answered before scipy and matplotlib are loaded.
    from lowrank_kit.report import render
    from lowrank_kit.report.facts import commands
    from lowrank_kit.report.find import find_runs, without
    from lowrank_kit.report.gallery import gather
    from lowrank_kit.report.pareto import plot_pareto
    from lowrank_kit.report.table import build
    from lowrank_kit.runs.directory import write_atomically

    # Wide enough for every column: a table in a log file must not be cut to the width of no terminal.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with console.status("reading the runs"):
        runs, left_out = find_runs(folders, named)
        report = build(without(runs, ignored), left_out, level)
    # A place that is none is told before anything is shown.
    output.mkdir(parents=True, exist_ok=True)
    render.print_report(report, console)
    with console.status("composing the commands"):
        made = list(commands(report))
    with console.status("drawing the plots"):
        plots, gallery = plot_pareto(report, output), gather(report)
    for name, text in (
        ("report.md", render.markdown(report, made, plots)),
        ("table.tex", render.latex(report)),
        ("table.csv", render.tidy(report, made)),
        ("report.html", render.html(report, made, plots, gallery)),
    ):
        write_atomically(output / name, text)
    print(f"report: {output}")


if __name__ == "__main__":
    sys.exit(main())
