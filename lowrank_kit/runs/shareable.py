"""A configuration as it may be shown to others: without the folders of the machine that it was used on."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lowrank_kit.models.load import PACKAGED

# No folder, so that a command with it says at once what has to be given.
PLACE = "PATH_TO"


def is_on_hub(path: str) -> bool:
    """Whether a model's path names a repository of the hub, and no folder that is there."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def portable_model(path: str) -> str:
    """A model's path; a folder as ``PATH_TO/LAST_COMPONENT``."""
    return path if path.startswith(PACKAGED) or is_on_hub(path) else _placeholder(path)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration, every folder in it as ``PATH_TO/LAST_COMPONENT``; hub names stay."""
    shown: dict[str, Any] = _without_absolute(config)
    shown["model"]["path"] = portable_model(config["model"]["path"])
    if (root := config["data"]["root"]) is not None:
        shown["data"]["root"] = _placeholder(root)
    return shown


def _without_absolute(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_absolute(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_absolute(inner) for inner in value]
    return _placeholder(value) if isinstance(value, str) and PurePath(value).is_absolute() else value


def _placeholder(path: str) -> str:
    return f"{PLACE}/{Path(path).absolute().name}"
