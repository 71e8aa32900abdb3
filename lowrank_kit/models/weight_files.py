"""Files of weights: written for all whom the umask allows; looked at before a weight is read, and no code runs."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_json, share

REMEDY = "fetch it or write it again"
# In the order in which transformers looks for them.
_NAMES = ("model.safetensors", "pytorch_model.bin")


def check_weight_files(folder: Path) -> None:
    """Look at every file that transformers would read the weights of ``folder`` from.

    Raises `LowRankKitError` where there is none, and for one that is missing, cut short, empty or holds anything but
    tensors, naming the file; for an index that is no index, or that names a file outside ``folder``.
    """
    for file in weight_files(folder):
        check_tensors(file)


def check_tensors(file: Path) -> None:
    """Raise `LowRankKitError` for a file that is not whole, or holds anything but tensors. Reads names and shapes."""
    from safetensors import safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
            return
        # On the meta device no weight is read; files of before torch 1.6 cannot be mapped.
        content = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    # A pickle can fail in any way that its author likes.
    except Exception as error:
        raise LowRankKitError(damage(file, error)) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise LowRankKitError(f"'{file}' holds no weights: a dictionary of tensors is wanted, as torch.save writes it")


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of safetensors, with the permissions that any new file gets.

    Raises `LowRankKitError` where the system refuses, for want of room above all; nothing of the file is left then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, dict(metadata) if metadata else None)
        share(file)
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise LowRankKitError(
            f"'{file}' cannot be written ({error}): make room and start the run again; it goes on at this file"
        ) from error


def damage(file: Path, error: Exception) -> str:
    """The message for a file that cannot be read."""
    cause = (str(error).strip().splitlines() or [""])[0]
    return f"'{file}' is damaged or was not written to its end ({type(error).__name__}: {cause}): {REMEDY}"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of ``folder`` from; errors as for `check_weight_files`."""
    for name in _NAMES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    raise LowRankKitError(
        f"'{folder}' has no weights: neither {' nor '.join(_NAMES)}, whole or in shards; fetch or write them again"
    )


def _shards(index: Path) -> list[Path]:
    wanted = read_json(index, dict, REMEDY).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
        raise LowRankKitError(f"'{index}' has no weight_map from weights to files: {REMEDY}")
    names = sorted(set(wanted.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise LowRankKitError(
                f"'{index}' names '{name}', a file outside its folder, which is not read: take the checkpoint from "
                "where it was published, or put the file beside the index and name it without a folder"
            )
        if not (index.parent / name).is_file():
            raise LowRankKitError(f"'{index.parent / name}' is missing, though '{index.name}' names it: fetch it")
    return [index.parent / name for name in names]
