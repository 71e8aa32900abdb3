"""`lowrank-kit VERB ...`: every command of the toolkit by one word."""

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from lowrank_kit.errors import did_you_mean

VERBS = {
    "run": "lowrank_kit.run",
    "methods": "lowrank_kit.commands.methods",
    "doctor": "lowrank_kit.commands.doctor",
    "inspect": "lowrank_kit.commands.inspect",
    "diff": "lowrank_kit.commands.diff",
    "report": "lowrank_kit.report.__main__",
    "compare": "lowrank_kit.compare",
    "export": "lowrank_kit.export",
    "eora": "lowrank_kit.eora",
    "assets": "lowrank_kit.assets.__main__",
    "cache": "lowrank_kit.cache.__main__",
    "completion": "lowrank_kit.commands.completion",
}
"""The module of each, whose `main` takes the words behind it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb in ("--help", "-h", "help"):
        print(_help())
        return 0
    if verb == "--version":
        from lowrank_kit import __version__

        print(f"lowrank_kit {__version__}")
        return 0
    if verb not in VERBS:
        hint = "; a run is `lowrank-kit run ...`" if "=" in verb or verb.startswith("-") else did_you_mean(verb, VERBS)
        print(f"error: lowrank-kit has no command '{verb}'{hint}", file=sys.stderr)
        return 2
    return int(import_module(VERBS[verb]).main(rest) or 0)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {_summary(module)}" for verb, module in VERBS.items()]
    return "\n".join(
        [
            "Adapt and compress language models with low-rank methods.",
            "",
            "Usage: lowrank-kit COMMAND ...        each has its own --help",
            "",
            *lines,
        ]
    )


def _summary(module: str) -> str:
    """The first sentence of a module's docstring, behind the command that it may begin with; nothing is imported."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split())
    words = (sentence.partition("`: ")[2] or sentence).rstrip(".")
    return words[0].upper() + words[1:]
