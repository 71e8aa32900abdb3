"""The command line that makes a run again, for several seeds at once."""

import shlex
from collections.abc import Sequence

from lowrank_kit.errors import ConfigError
from lowrank_kit.report.find import Run
from lowrank_kit.retrace import PROGRAM, overrides_of


def command_of(run: Run, seeds: Sequence[int]) -> str:
    """Return a shell command for these seeds of a run's configuration, without the places that it writes to.

    Where this installation's YAML files and methods cannot make it, it is what was typed, as the manifest has it.
    """
    try:
        words = overrides_of(run.config, _named(run))
    except ConfigError as error:
        typed = [str(word) for word in run.manifest.get("command", ["(not recorded)"])]
        return f"{shlex.join(typed)}  # as typed: {str(error).splitlines()[0]}"
    seed = [f"seed={','.join(map(str, seeds))}"] if list(seeds) != [0] else []
    return f"{PROGRAM}{' -m' if len(seeds) > 1 else ''} {shlex.join([*words, *seed])}"


def _named(run: Run) -> list[str]:
    # As they were read: ours, and what the person who reads the run allowed.
    return list(run.config["run"]["method_prefixes"])
