"""The checkpoints of the Trainer, from which an interrupted training goes on."""

import json
import shutil
import zipfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.weight_files import check_tensors


def whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint in a folder that was finished; halves of others, left by a killed process, are removed.

    Raises `LowRankKitError` where a file of it is gone or was not written to its end.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_finished(path):
            whole.append(path)
        else:
            shutil.rmtree(path)
    latest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if latest is None:
        return None
    _check_undamaged(latest)
    return str(latest)


def _is_finished(checkpoint: Path) -> bool:
    # The Trainer writes its state file last, but not atomically.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def _check_undamaged(checkpoint: Path) -> None:
    """Raise `LowRankKitError` for a file that is not as it was written, or gone."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.suffix in (".safetensors", ".pt", ".pth", ".bin")]
    # Those of sharded trainings have folders, which are left to who wrote them.
    if not any(path.is_dir() for path in checkpoint.iterdir()):
        files += [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
    remedy = f"remove '{checkpoint}', and training starts over, or bring back what was there"
    for file in files:
        if file.suffix == ".safetensors":
            try:
                check_tensors(file)
            except LowRankKitError as error:
                raise LowRankKitError(f"{error}; or {remedy}") from error
        elif not zipfile.is_zipfile(file):
            raise LowRankKitError(f"'{file}' is gone or was not written to its end: {remedy}")
