"""What is wrong with a configuration, in the words of the person who typed it."""

import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lowrank_kit.config.section import Choice
from lowrank_kit.errors import did_you_mean


def explain(schema: type[BaseModel], problem: ErrorDetails) -> str:
    """Put one of pydantic's errors: the dotted key, the value given, what is legal and the nearest legal spelling."""
    steps = problem["loc"]
    key = ".".join(_typed_steps(schema, steps)) or "configuration"
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "extra_forbidden":
        siblings = _fields_of(_annotation_at(schema, steps[:-1]))
        return f"{key} is not a key{_elsewhere(schema, key) or did_you_mean(str(steps[-1]), siblings)}"
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:76]}..."
    if kind in ("missing", "union_tag_not_found"):
        return f"{key}{'' if kind == 'missing' else '.kind'} is missing"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{key}={shown} should have {bound} of them"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context["expected_tags"]
        given = value if kind == "literal_error" else context["tag"]
        options = re.findall(r"[^',\s]+", expected.replace(" or ", " "))
        suffix = ".kind" if kind == "union_tag_invalid" else ""
        return f"{key}{suffix}={given!r} is not legal{did_you_mean(str(given), options)}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error" and isinstance(value, Mapping):
        return f"{key}: {message}"
    if kind == "string_type" and isinstance(value, (int, float)):
        message = f"should be text: in quotes, \"{key}='{value}'\""
    message = _PLAINER.get(kind, message)
    return f"{key}={shown} {message}"


_PLAINER = {
    "tuple_type": "should be a list, such as [a, b]",
    "dict_type": "should be a mapping, such as {a: b}",
    "model_type": "should be a mapping, such as {a: b}",
    "finite_number": "should be a finite number",
}


def _elsewhere(schema: type[BaseModel], key: str) -> str:
    """The nearest key of the same name in another section, and which choices have it; empty: there is none."""
    typed = tuple(key.split("."))
    places = _places(schema, typed[-1])
    if not places:
        return ""

    def nearness(place: tuple[str, ...]) -> tuple[int, bool, int]:
        shared = takewhile(lambda steps: steps[0] == steps[1], zip(typed, place, strict=False))
        return len(list(shared)), not places[place], -len(place)

    near = max(places, key=nearness)
    meant = "" if near == typed else f"; did you mean '{'.'.join(near)}'?"
    return meant + (f"; {' and '.join(places[near])} have it" if places[near] else "")


def _places(annotation: Any, name: str, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """The paths of all keys of this name, each with the choices that have it; none: whatever is chosen."""
    annotation = _bare(annotation)
    found: dict[tuple[str, ...], list[str]] = {}
    if _has_choices(annotation):
        for kind, member in sorted(annotation.known.items()):
            for place in _places(member, name, at):
                found.setdefault(place, []).append(f"{'.'.join(at)}={kind}")
        return {place: [] if len(kinds) == len(annotation.known) else kinds for place, kinds in found.items()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for field, info in annotation.model_fields.items():
            found |= {(*at, field): []} if field == name else _places(info.annotation, name, (*at, field))
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            found |= _places(member, name, at)
    return found


def _typed_steps(schema: type[BaseModel], steps: tuple[int | str, ...]) -> Iterator[str]:
    """The steps that somebody typed: pydantic puts the tag of a union between a key and its fields."""
    annotation: Any = schema
    for step in steps:
        if not _is_tag(annotation, step):
            yield str(step)
        try:
            annotation = _annotation_at(annotation, (step,))
        except (KeyError, IndexError):
            # The last one, which is not known.
            return


def _tags(member: type[BaseModel]) -> tuple[str, ...]:
    return get_args(member.model_fields["kind"].annotation)


def _is_tag(annotation: Any, step: int | str) -> bool:
    annotation = _bare(annotation)
    if _has_choices(annotation):
        return step in annotation.known
    if get_origin(annotation) not in (Union, UnionType):
        return False
    return any("kind" in _fields_of(member) and step in _tags(member) for member in get_args(annotation))


def _annotation_at(annotation: Any, steps: tuple[int | str, ...]) -> Any:
    """Follow an error's location through sections, choices and unions (by tag), and dictionaries."""
    for step in steps:
        annotation = _bare(annotation)
        if _has_choices(annotation) and step in annotation.known:
            annotation = annotation.known[step]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(step)].annotation
        elif get_origin(annotation) in (Union, UnionType):
            members = [a for a in get_args(annotation) if a is not NoneType]
            tagged = [a for a in members if "kind" in _fields_of(a) and step in _tags(a)]
            annotation = tagged[0] if tagged else _annotation_at(members[0], (step,))
        else:
            annotation = get_args(annotation)[-1]
    return annotation


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _has_choices(annotation: Any) -> bool:
    """Whether it stands for several classes by `kind`: a direct subclass of `Choice`."""
    return isinstance(annotation, type) and issubclass(annotation, Choice) and Choice in annotation.__bases__


def _fields_of(annotation: Any) -> tuple[str, ...]:
    """Return the keys of a section; nothing for any other type."""
    known = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return tuple(annotation.model_fields) if known else ()
