"""Whose code a configuration may name: ours, what an installed package declares, and what the person names.

A file, be it a run's own `config.yaml`, is no person: what it allows itself counts for nothing when it is read.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowrank_kit.errors import LowRankKitError

GROUP = "lowrank_kit.plugins"
"""Entry points of this group name packages of methods, parts of methods and families: ``mylab = "mylab"``."""

OURS = ("lowrank_kit.adapters", "lowrank_kit.compressors", "lowrank_kit.config.method")


def installed() -> tuple[str, ...]:
    """Return the packages that installed distributions declare, by name."""
    return tuple(sorted(entry.value for entry in _declared()))


def import_installed() -> None:
    """Import what installed distributions declare, so that their classes register themselves; once a process.

    Raises `LowRankKitError` where a package cannot be imported, or takes a name that exists.
    """
    for entry in _declared():
        _imported(entry)


def conf_folders() -> list[Path]:
    """Return the folders ``conf`` inside the installed packages: their YAMLs are options beside ours."""
    found = []
    for package in installed():
        spec = find_spec(package.partition(".")[0])
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (folder := Path(place, "conf")).is_dir():
                found.append(folder)
    return found


def allowing(config: Mapping[str, Any], named: Sequence[str] = ()) -> dict[str, Any]:
    """Return a configuration that was read; allowed are our methods and the packages that the person ``named``."""
    run = config.get("run")
    own = run if isinstance(run, Mapping) else {}
    return {**config, "run": {**own, "method_prefixes": list(named)}}


def let_here(named: Sequence[str]) -> None:
    """Let packages that the person ``named`` lie in the working directory; what is installed goes before it."""
    if named and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def _declared() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.value)


@cache
def _imported(entry: EntryPoint) -> None:
    try:
        import_module(entry.value)
    except LowRankKitError as error:
        raise LowRankKitError(f"the plug-in {_whose(entry)}: {error}") from error
    except Exception as error:
        raise LowRankKitError(
            f"the plug-in {_whose(entry)} cannot be imported: {type(error).__name__}: {error}; mend it, or uninstall it"
        ) from error


def _whose(entry: EntryPoint) -> str:
    distribution = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
    return f"'{entry.name}'{distribution}"
