"""Text of others inside Markdown: shown as it is, never read as markup."""

import re

from lowrank_kit.files import plain

_MARKS = str.maketrans({character: f"\\{character}" for character in "\\`*|<"})


def in_markdown(text: str) -> str:
    """Return a text for a line or a cell of a table: one line, without markup, links or HTML."""
    return plain(text).translate(_MARKS).replace("](", "]\\(")


def fenced(text: str, language: str = "") -> str:
    """Return a block of code with a fence longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
