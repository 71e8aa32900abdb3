"""The text of `--help`, generated from the schema and the YAMLs that it describes."""

import re
from collections.abc import Iterator, Mapping
from textwrap import fill
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from lowrank_kit.config import Choice, RunConfig

INTRODUCTION = """\
Adapt or compress a language model with a low-rank method, evaluate it, and leave a run directory behind.

Usage: lowrank-kit run [GROUP=OPTION | KEY=VALUE ...]
       lowrank-kit run -m KEY=VALUE,VALUE,...    one run for each combination
       python -m lowrank_kit.run ...             the same command, by its module

A run calibrates, plans, applies the method, trains and evaluates. It prints `run: DIR` as its last line; DIR
holds config.yaml, manifest.json, status.json, results.json and the adapter or the compressed checkpoint. The same
command again resumes where the last one stopped. Exit status: 0 all done, 1 the work failed, 2 the command is wrong.

Examples
  lowrank-kit run method=astra task=glue/rte
  lowrank-kit run method=hisvd task=perplexity method.ratio=0.2 calibration.samples=32 eval.limit=8
  lowrank-kit run method=svd_llm allocation=d_rank truncation=two_sided task=perplexity
  lowrank-kit run method=zs_svd method.preset=paper method.ratio=0.6 task=perplexity    as published
  lowrank-kit run method=lora task=glue seed=1 train.max_steps=300 train.learning_rate=5e-4
  lowrank-kit run -m method=astra,lora method.rank=8,16 task=glue/sst2 seed=0,1,2
  lowrank-kit run -m method=svd_llm,hisvd method.ratio=0.2,0.4 task=perplexity hydra/launcher=slurm_gpu
  lowrank-kit run method=none data=local data.root=my_rows task=glue/cola
  lowrank-kit run debug=fast tracker=wandb tracker.mode=offline
  lowrank-kit run method=astra method.subspace=top --cfg job --resolve    show, do not run
"""

FOOTER = """\
Flags
  -m, --multirun      sweep over comma-separated values; every combination is checked before the first runs;
                      hydra/launcher= says where they run, hydra/sweeper=optuna makes it a search
  --cfg job --resolve print the configuration and stop
  --config-dir DIR    a folder with more YAMLs: DIR/method/mine.yaml makes method=mine an option
  --hydra-help        everything Hydra itself can do"""


def help_text(
    schema: type[RunConfig],
    defaults: Mapping[str, Any],
    options: Mapping[str, list[str]],
    presets: Mapping[str, list[str]],
) -> str:
    """Return the help page for a configuration: `schema` types it, `defaults` are its present values.

    ``options`` are those of every group, ``presets`` the methods that have each.
    """
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        value = defaults.get(name)
        if (section := _section_type(field.annotation, value)) is not None:
            keys.append(f"\n{name}: {one_line(field.description)}")
            for key, its_field, its_value in fields(section, value or {}, f"{name}."):
                keys += _key(key, its_field, its_value)
        else:
            keys += ["", *_key(name, field, value)]
    heading = "Keys (type, value in this configuration, meaning; those of `method` are the chosen method's)"
    groups = ["Groups (GROUP=OPTION)", *_listed(options)]
    published = ["Presets (method.preset=NAME) and the methods that have them", *_listed(presets)]
    return "\n".join([INTRODUCTION, *groups, "", *published, "", heading, *keys, "", FOOTER])


def _listed(names: Mapping[str, list[str]]) -> list[str]:
    return [
        fill(", ".join(members), 120, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15)
        for name, members in names.items()
    ]


def _section_type(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section that a key is; of several, the one of the value's `kind`. None for a plain value."""
    if get_origin(annotation) is Annotated:
        return _section_type(get_args(annotation)[0], value)
    if isinstance(annotation, type) and issubclass(annotation, Choice) and isinstance(value, Mapping):
        return annotation.known.get(value["kind"], annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) not in (Union, UnionType) or not isinstance(value, Mapping):
        return None
    for member in get_args(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel) and _kind(member) == value["kind"]:
            return member
    return None


def _kind(section: type[BaseModel]) -> str:
    [kind] = get_args(section.model_fields["kind"].annotation)
    return str(kind)


def fields(
    section: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield every key of a section behind ``prefix``, with its field and its value; of the sections inside, too."""
    for name, field in section.model_fields.items():
        value = values.get(name, to_jsonable_python(field.get_default(call_default_factory=True), fallback=str))
        if (inner := _section_type(field.annotation, value)) is not None:
            yield from fields(inner, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, value


def _key(key: str, field: FieldInfo, value: Any) -> Iterator[str]:
    shown = ", ".join(value) if isinstance(value, Mapping) and value else yaml_value(value)
    yield f"  {key} ({type_name(field)}) = {shown}"
    yield fill(one_line(field.description), 120, initial_indent=" " * 6, subsequent_indent=" " * 6)


def yaml_value(value: Any) -> str:
    """Return a value as it is typed: `null`, `true`, `[a, b]`; line breaks as `\\n`."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def one_line(text: str | None) -> str:
    """Return a docstring without its line breaks."""
    return re.sub(r"\s+", " ", text or "").strip()


def type_name(field: FieldInfo) -> str:
    """Return a field's type in words, with its bounds: `integer >= 1 or null`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    first, *rest = _type_words(field.annotation).split(" or ")
    return " or ".join([" ".join([first, " and ".join(bounds)]).strip(), *rest])


def _type_words(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is Annotated:
        return _type_words(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_type_words(arg) for arg in args)
    if origin in (list, tuple):
        return f"list of {_type_words(args[0])}"
    if origin is dict:
        return f"{_type_words(args[0])} -> {_type_words(args[1])}"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
