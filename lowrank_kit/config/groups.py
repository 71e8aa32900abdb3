"""The groups of settings and their options, as the folders of YAMLs have them; Hydra is not asked."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def conf_folder() -> Path:
    """Return the folder of YAMLs: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return every config group of these folders with its options, for example `task: [glue, glue/rte]`."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            parts = file.relative_to(folder).with_suffix("").parts
            depth = 2 if parts[0] == "hydra" else 1
            if parts[0] != "published":
                found["/".join(parts[:depth])].add("/".join(parts[depth:]))
    return {group: sorted(names) for group, names in sorted(found.items())}


def presets(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return the presets of these folders with the methods that have them, for example `paper: [asvd, d_rank]`."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for file in folder.glob("published/method/*/*.yaml"):
            found[file.parent.name].add(file.stem)
    return {preset: sorted(methods) for preset, methods in sorted(found.items())}
