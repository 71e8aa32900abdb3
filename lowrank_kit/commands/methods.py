"""`lowrank-kit methods [NAME]`: all methods, what each is, and what it needs of a model; or the settings of one."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_kit.config import Method
from lowrank_kit.console import command
from lowrank_kit.errors import ConfigError, did_you_mean

PAPER = re.compile(r"arXiv \d{4}\.\d{4,5}")


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit methods", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the settings of this one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    with command():
        _show(options.name)
    return 0


def _show(name: str | None) -> None:
    from lowrank_kit.compose import Composer
    from lowrank_kit.config import load

    composer = Composer()
    names = composer.options["method"]
    if name is not None and name not in names:
        raise ConfigError(f"there is no method '{name}'{did_you_mean(name, names)}")
    table = Table("method", "what it is", "paper", "reads", "what it leaves")
    for found in [name] if name else names:
        task = [] if found == "none" else ["task=perplexity"]
        method = load(composer.compose([f"method={found}", *task])).method
        words = _introduction(found, [composer.folder, *composer.more])
        papers = PAPER.findall(words)
        what = re.sub(r" *\([^()]*arXiv [^()]*\)", "", words).partition(". ")[0].rstrip(".")
        table.add_row(found, what, "\n".join(papers) or "", reads(method), leaves(method))
    # Wide enough for every column: a table in a file must not be cut to the width of no terminal.
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    if name:
        table = Table("setting", "default", "meaning")
        for key, field in type(method).model_fields.items():
            value = getattr(method, key)
            shown = value.model_dump() if hasattr(value, "model_dump") else value
            meaning = " ".join((field.description or "").split())
            table.add_row(f"method.{key}", escape(str(shown)), escape(meaning))
        console.print(table)


def reads(method: Method) -> str:
    """What a method has to know of the model before it decides, from the cheapest to the dearest."""
    if method.reads_gradients:
        found = "weights, a forward and a backward pass"
    elif method.calibrates:
        found = "weights, a forward pass"
    else:
        found = "weights"
    return f"{found}, measured losses" if method.probe else found


def leaves(method: Method) -> str:
    """What a run of it ends with."""
    if method.compresses:
        return "a smaller checkpoint"
    if method.adapts:
        return "an adapter"
    return "a trained checkpoint" if method.trains else "figures"


def _introduction(name: str, folders: Sequence[Path]) -> str:
    """The comment at the head of a method's YAML, on one line."""
    file = next(f for folder in folders if (f := folder / "method" / f"{name}.yaml").is_file())
    lines: list[str] = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
