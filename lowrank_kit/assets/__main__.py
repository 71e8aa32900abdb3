"""`lowrank-kit assets [NAME ...] [--list] [--cache DIR]`: fetch the packaged models and rows."""

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lowrank_kit.assets.asset_cache import cache_dir, fetch, is_present
from lowrank_kit.assets.catalogue import CATALOGUE
from lowrank_kit.console import explained


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit assets", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CATALOGUE)} (default: all)")
    parser.add_argument("--list", action="store_true", help="show what there is and what is here already")
    parser.add_argument("--cache", metavar="DIR", help=f"cache folder (default: {cache_dir()})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    if options.cache:
        os.environ["LOWRANK_KIT_CACHE"] = options.cache
    console = Console()
    try:
        if options.list:
            console.print(_table())
        else:
            fetch(options.names or list(CATALOGUE), console)
    except Exception as error:
        return explained(error)
    return 0


def _table() -> Table:
    table = Table("asset", "here", "MB", "package", "licence", "what", title=f"assets in {cache_dir()}")
    for name, asset in CATALOGUE.items():
        here = "yes" if is_present(name) else "no"
        package = f"{asset.package} {asset.version}"
        table.add_row(name, here, str(asset.megabytes), package, asset.licence, asset.note)
    return table


if __name__ == "__main__":
    sys.exit(main())
