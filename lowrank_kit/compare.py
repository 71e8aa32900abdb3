"""Compare two runs on the benchmarks that both were evaluated on, row by row."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit compare", description=__doc__)
    text = "run directory (its final model), or a folder of samples such as RUN/samples/dense"
    parser.add_argument("first", type=Path, metavar="RUN_A", help=text)
    parser.add_argument("second", type=Path, metavar="RUN_B", help="the same; differences are B - A")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    try:
        _compare(samples_in(options.first), samples_in(options.second), options.seed)
    except Exception as error:
        return explained(error)
    return 0


def samples_in(path: Path) -> Path:
    """Find the samples: a folder that holds them, or those of a run's final model.

    Raises `ConfigError` where there are none.
    """
    for folder in (path, path / "samples/final"):
        if any(folder.glob("*.jsonl")):
            return folder
    if not path.is_dir():
        raise ConfigError(f"there is no folder '{path}'")
    raise ConfigError(f"'{path}' has no samples/final/NAME.jsonl: give a finished run that was evaluated on benchmarks")


def _compare(first: Path, second: Path, seed: int) -> None:
    # Imported only now: a wrong command is answered before numpy and scikit-learn are loaded.
    from lowrank_kit.evaluation.paired import compare

    columns = ("benchmark", "metric", "rows", "A", "B", "B - A", "95 % interval", "p")
    table = Table(*columns, title="McNemar's exact p; intervals by paired bootstrap")
    for found in compare(first, second, seed):
        table.add_row(
            found.benchmark, found.metric, str(found.n), f"{found.first:.4f}", f"{found.second:.4f}",
            f"{found.second - found.first:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}",
            "" if found.p is None else f"{found.p:.3g}",
        )  # fmt: skip
    # Wide enough for every column: a table in a log file must not be cut to the width of no terminal.
    Console(width=max(100, Console().width)).print(table)
    print(f"A: {first}\nB: {second}")


if __name__ == "__main__":
    sys.exit(main())
