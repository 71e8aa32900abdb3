"""No function takes more parameters than a reader can hold in mind."""

import ast
from collections.abc import Iterator
from pathlib import Path

import lowrank_kit

MOST = 8


def parameters() -> Iterator[tuple[str, int]]:
    """Every function as FILE NAME, and how many parameters it takes, `self` and `cls` not counted."""
    root = Path(lowrank_kit.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                yield f"{file.relative_to(root)} {node.name}", len([n for n in names if n not in ("self", "cls")])


def test_a_function_takes_eight_parameters_at_most():
    assert [name for name, count in parameters() if count > MOST] == []
