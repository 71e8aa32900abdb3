"""Whose code a configuration may name: ours, what an installed package declares, and what the person names.

A file, be it a run's own `config.yaml`, is no person: what it allows itself counts for nothing when it is read.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "lowrank_kit.methods"
"""Entry points of this group name packages of methods: ``mylab = "mylab"``."""

OURS = ("lowrank_kit.methods",)


def installed_prefixes() -> tuple[str, ...]:
    """Return the packages that installed distributions declare."""
    return tuple(entry.value for entry in entry_points(group=GROUP))


def allowing(config: Mapping[str, Any], named: Sequence[str] = ()) -> dict[str, Any]:
    """Return a configuration that was read; allowed are our methods and the packages that the person ``named``."""
    run = config.get("run")
    own = run if isinstance(run, Mapping) else {}
    return {**config, "run": {**own, "method_prefixes": [*OURS, *named]}}


def let_here(named: Sequence[str]) -> None:
    """Let packages that the person ``named`` lie in the working directory; what is installed goes before it."""
    if set(named) - set(OURS) and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
