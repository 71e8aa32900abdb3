"""`lowrank-kit cache [--clear [KEY ...]]`: list what runs keep on disk for other runs, or clear it."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank_kit.assets import cache_dir
from lowrank_kit.cache.entry import KEY_FILE, Entry, entries, limit_bytes, remove
from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError, did_you_mean

KINDS = ("calibration", "perplexity", "benchmarks")


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit cache", description=__doc__)
    parser.add_argument(
        "--clear", nargs="*", metavar="KEY", help="remove the entries whose keys begin so; without a KEY, all"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    console = Console()
    try:
        known = {kind: entries(cache_dir() / kind) for kind in KINDS}
        if options.clear is None:
            total = sum(entry.size for found in known.values() for entry in found)
            console.print(_table(known))
            console.print(f"{_size(total)} in {cache_dir()}; at most {_size(limit_bytes())} a kind", soft_wrap=True)
        else:
            for entry in _chosen([entry for found in known.values() for entry in found], options.clear):
                remove(entry)
                console.print(f"removed {entry.folder.name} ({_size(entry.size)})")
    except Exception as error:
        return explained(error)
    return 0


def _chosen(known: Sequence[Entry], wanted: Sequence[str]) -> list[Entry]:
    names = [entry.folder.name for entry in known]
    for start in wanted:
        if not any(name.startswith(start) for name in names):
            raise ConfigError(f"no entry of the cache begins with '{start}'{did_you_mean(start, names)}")
    return [entry for entry in known if not wanted or entry.folder.name.startswith(tuple(wanted))]


def _table(known: dict[str, list[Entry]]) -> Table:
    table = Table("kind", "key", "size", "last used", "model", "what")
    for kind, found in known.items():
        for entry in reversed(found):
            used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
            table.add_row(kind, entry.folder.name[:12], _size(entry.size), used, *_facts(entry.folder))
    return table


def _facts(folder: Path) -> tuple[str, str]:
    """The model's class and what was asked of it, as far as the key can be read."""
    try:
        key = json.loads((folder / KEY_FILE).read_text("utf-8"))
        return key["architecture"].rpartition(".")[2], json.dumps(key["request"])[:60]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "?", "its key is damaged"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
