"""The overrides that compose a configuration again, found from it alone."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import load
from lowrank_kit.config.plugins import allowing
from lowrank_kit.errors import ConfigError
from lowrank_kit.files import read_yaml
from lowrank_kit.runs.directory import identity
from lowrank_kit.runs.shareable import portable

# Groups whose option is named like the section's own `name` or, of data, like its source.
GROUPS = ("method", "model", "task", "data", "recovery")
PROGRAM = "python -m lowrank_kit.run"


def command_elsewhere(run: Path, named: Sequence[str] = ()) -> str | None:
    """The command for a run directory's figures on another machine; None for a method that has no YAML file here.

    ``named``: packages of methods that the person allows, see `overrides_of`.
    """
    config = read_yaml(run / "config.yaml")
    seed = [f"seed={config['seed']}"]
    try:
        return f"{PROGRAM} {shlex.join(overrides_of(portable(config), named) + seed)}"
    except ConfigError:
        return None


def overrides_of(config: Mapping[str, Any], named: Sequence[str] = ()) -> list[str]:
    """Return the overrides, the seed's apart, that compose this configuration from the YAML files.

    Nothing is imported but our methods, those of installed plug-ins and of the packages ``named``, whatever the
    configuration itself allows. Raises `ConfigError` where the YAML files have nothing to start from.
    """
    wanted = load(allowing(config, named))
    plain = identity(wanted)
    seed = plain.pop("seed")
    if plain["method"].get("seed") == seed:
        del plain["method"]["seed"]
    names = [(group, _option(group, plain)) for group in GROUPS]
    options = tuple(f"{group}={name}" for group, name in names if name is not None)
    if not any(option.startswith("method=") for option in options):
        raise ConfigError(f"conf/method has no {plain['method']['name']}.yaml")
    # Without its folder `data=local` is not even a configuration to start from.
    if (root := plain["data"]["root"]) is not None:
        options += (f"data.root={_value(root)}",)
    start = dict(_composed(options))
    start.pop("seed")
    if plain["method"].get("seed") is None:
        start["method"] = {key: value for key, value in start["method"].items() if key != "seed"}
    allowed = [f"run.method_prefixes={_value(list(named))}"] if named else []
    return [*options, *allowed, *_differences(start, plain)]


@cache
def _composer() -> Composer:
    return Composer()


@cache
def _composed(options: tuple[str, ...]) -> dict[str, Any]:
    [job] = _composer().jobs(force_dotted(options), multirun=False)
    return identity(job)


def _option(group: str, plain: Mapping[str, Any]) -> str | None:
    """The YAML file that a section most likely came from; None where there is none of its name."""
    section = plain[group]
    name = section["source"] if group == "data" else section["what"] if group == "recovery" else section["name"]
    return name if name in _composer().options[group] else None


def _differences(start: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**wanted, **start}:
        name = f"{prefix}{key}"
        if key not in wanted:
            yield f"~{name}"
        elif isinstance(wanted[key], Mapping) and wanted[key] and isinstance(start.get(key), Mapping):
            yield from _differences(start[key], wanted[key], f"{name}.")
        elif key not in start or start[key] != wanted[key]:
            yield f"{name}={_value(wanted[key])}"


def _value(value: Any) -> str:
    """A JSON value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w./-]*", value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
