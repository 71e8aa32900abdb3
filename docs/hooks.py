"""Fills the reference page of the configuration from the schema that checks it."""

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from lowrank_kit.config import RunConfig
from lowrank_kit.help import type_name

MARK = "<!-- schema -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by a table for every section."""
    return markdown.replace(MARK, "\n".join(_sections(RunConfig, "Top level"))) if MARK in markdown else markdown


def _sections(section: type[BaseModel], title: str) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{_flat(section.__doc__)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    inner = []
    for name, field in section.model_fields.items():
        found = list(_models(field.annotation))
        inner += [(member, f"{name}: {member.__name__}") for member in found]
        value = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        default = "" if found else value
        cells = [f"`{name}`", type_name(field), default, _flat(field.description)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for member, heading in inner:
        yield from _sections(member, heading)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_fields:
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)


def _flat(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()
