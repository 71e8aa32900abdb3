"""Fills the reference page of the configuration from the schema that checks it, and sets formulas as MathML.

Formulas are set when the site is built: a reader needs neither a script nor a network.
"""

import re
from collections.abc import Iterator, Mapping
from html import unescape
from typing import Any, get_args, get_origin

from latex2mathml.converter import convert
from omegaconf import OmegaConf
from pydantic import BaseModel

from lowrank_kit.compose import Composer
from lowrank_kit.config import RunConfig
from lowrank_kit.help import one_line, type_name, yaml_value

MARK = "<!-- schema -->"
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by a table for every section."""
    if MARK not in markdown:
        return markdown
    values: Any = OmegaConf.to_container(Composer().compose(), resolve=True)
    return markdown.replace(MARK, "\n".join(_sections(RunConfig, "", values)))


def on_page_content(html: str, **_: Any) -> str:
    """Set what arithmatex has marked as a formula."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    is_block = found[1] == "["
    set_ = convert(unescape(found[2]).strip(), display="block" if is_block else "inline")
    return f'<div class="formula">{set_}</div>' if is_block else set_


def _sections(section: type[BaseModel], key: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A section and those inside; `values` are what `conf` makes its defaults, where it does."""
    yield f"## {key}: {section.__name__}\n" if key else "## Top level\n"
    yield f"{one_line(section.__doc__)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[type[BaseModel], str, Mapping[str, Any]]] = []
    for name, field in section.model_fields.items():
        path = f"{key}.{name}" if key else name
        value = values.get(name, field.get_default(call_default_factory=True))
        sections = list(_models(field.annotation, path))
        for member, below in sections:
            given = value if isinstance(value, Mapping) and below == path and _is_kind(member, value) else {}
            inner.append((member, below, given))
        shown = "required" if field.is_required() and name not in values else f"`{yaml_value(value)}`"
        # Those of a section are in its own table.
        default = "" if sections and value is not None else shown
        cells = [f"`{name}`", type_name(field), default, one_line(field.description)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for member, below, given in inner:
        yield from _sections(member, below, given)


def _models(annotation: Any, path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections that a key may hold, and where: those of a mapping lie below a name of the user's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_fields:
            yield annotation, path
        return
    below = f"{path}.NAME" if get_origin(annotation) is dict else path
    for argument in get_args(annotation):
        yield from _models(argument, below)


def _is_kind(section: type[BaseModel], value: Mapping[str, Any]) -> bool:
    kind = section.model_fields.get("kind")
    return kind is None or "kind" not in value or value["kind"] in get_args(kind.annotation)
