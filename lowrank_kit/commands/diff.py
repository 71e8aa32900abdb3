"""`lowrank-kit diff RUN RUN`: what two runs differ in, and what came of it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_kit.console import command
from lowrank_kit.errors import ConfigError


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit diff", description=__doc__)
    parser.add_argument("first", type=Path, metavar="RUN_A")
    parser.add_argument("second", type=Path, metavar="RUN_B")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    with command():
        _show(options.first, options.second)
    return 0


def _show(first: Path, second: Path) -> None:
    from lowrank_kit.evaluation.records import read_records

    settings = [_settings(run) for run in (first, second)]
    records: list[dict[tuple[str, str, str], float]] = []
    for run in (first, second):
        found = read_records(run / "results.json") if (run / "results.json").is_file() else []
        records.append({(r.task, r.metric, r.checkpoint): r.value for r in found})
    console = Console(width=max(100, Console().width))
    table = Table("setting", "A", "B")
    for key in sorted(settings[0].keys() | settings[1].keys()):
        values = [found.get(key, "not there") for found in settings]
        if values[0] != values[1]:
            table.add_row(key, *map(str, values))
    console.print(table if table.row_count else "no setting differs")
    table = Table("task", "metric", "model", "A", "B", "B - A")
    a, b = records
    for measured in dict.fromkeys([*a, *b]):
        shown = [f"{found[measured]:.4g}" if measured in found else "" for found in records]
        change = f"{b[measured] - a[measured]:+.4g}" if measured in a and measured in b else ""
        table.add_row(*measured, *shown, change)
    console.print(table if table.row_count else "neither has results yet")
    print(f"A: {first}\nB: {second}")


def _settings(run: Path) -> dict[str, Any]:
    from lowrank_kit.files import read_yaml
    from lowrank_kit.runs.directory import CONFIG_FILE, flatten

    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"'{run}' is no run directory: it has no {CONFIG_FILE}")
    return flatten(read_yaml(run / CONFIG_FILE))
