"""Where a figure comes from: the state of the code, the versions, the command. A study writes none without it."""

import argparse
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowrank_kit import __version__
from lowrank_kit.files import read_json

PACKAGES = ("torch", "transformers", "peft", "datasets")
VERSIONS = {"lowrank_kit": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}
"""What every record says of the software that measured it."""
# What studies write beside themselves changes no figure.
_WRITTEN = ("*.results.json", "results.json", "*.table.md", "table.md", "*.png", "benchmarks/results")


def git_revision(checkout: Path) -> dict[str, Any] | None:
    """Return the commit and whether files differ from it; None if `checkout` is not the root of a repository.

    An installed package inside somebody else's repository must not take that repository's commit for its own.
    Results of studies are no difference.
    """

    def git(*arguments: str) -> str:
        # A look needs no lock, and one that is killed would leave it.
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None
        excluded = [f":(exclude){pattern}" for pattern in _WRITTEN]
        dirty = bool(git("status", "--porcelain", "--", ".", *excluded))
        return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        return None


def software() -> dict[str, Any]:
    """Return the versions of the software, the revision of a checkout (None: installed) and the command."""
    return {
        "versions": {
            "lowrank_kit": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "git": git_revision(Path(__file__).resolve().parents[2]),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def origin(run: Path) -> dict[str, Any]:
    """Return what a study's row says of its run: revisions and commands that worked on it, and hashes of its rows."""
    manifest = read_json(run / "manifest.json", dict) or {}
    data = {split: fact["sha256"] for split, fact in manifest.get("data", {}).items()}
    return {key: manifest.get(key) for key in ("git", "processes", "versions")} | {"data": data}


def parse_study(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a study or benchmark; ``provenance`` in it is `software`, for its result files.

    Exits with status 2 where the revision is unknown or files differ from it, unless ``--try-out`` is given, which
    marks the results: ``provenance["tried_out"]``.
    """
    parser.add_argument(
        "--try-out",
        action="store_true",
        help="run although the revision is unknown or files differ from it; the results are marked as tried out",
    )
    # Intermixed: overrides may stand behind the options.
    options = parser.parse_intermixed_args(arguments)
    found = software()
    git = found["git"]
    if git is None or git["dirty"]:
        if not options.try_out:
            why = "this is no checkout of the repository" if git is None else "files differ from the revision"
            parser.error(f"{why}, so that nobody could make these results again: commit first, or add --try-out")
        found["tried_out"] = True
    options.provenance = found
    return options


def in_words(provenance: Mapping[str, Any]) -> str:
    """Return a line for a table: the revision, whether it was only tried out, versions and command."""
    git, versions = provenance["git"], provenance["versions"]
    revision = f"revision {git['revision'][:12]}" if git else "revision unknown"
    mark = " **with changes: tried out, no result**" if provenance.get("tried_out") else ""
    software = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{revision}{mark}; {software}; `{' '.join(provenance['command'])}`"
