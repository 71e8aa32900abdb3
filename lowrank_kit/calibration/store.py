"""A cache of calibration results, keyed by everything that they depend on, one file a block."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_kit import distributed, launcher
from lowrank_kit.lock import exclusively

# Raise it when the numbers that calibration gives change: older caches are then not found any more.
CODE_VERSION = 1

BlockResults = dict[str, dict[str, Tensor]]


class CalibrationStore:
    """Results of calibration on disk; a killed run finds the blocks it had finished, and other runs find them too.

    Args:
        root: the folder of all caches.
        key: everything that the results depend on (model and sample fingerprints, what is asked, what is kept,
            dtype), JSON-serialisable. Two different keys never share a file.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        description = json.dumps({"code_version": CODE_VERSION, **key}, sort_keys=True, indent=1)
        self.key = hashlib.sha256(description.encode()).hexdigest()[:32]
        self.folder = root / self.key
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / "key.json", lambda path: path.write_text(description))

    def finished_blocks(self) -> set[int]:
        """Indices of the blocks that are whole on disk."""
        return {int(path.stem.removeprefix("block-")) for path in self.folder.glob("block-*.safetensors")}

    @contextmanager
    def missing(self, blocks: Collection[int]) -> Iterator[set[int]]:
        """Yield those of these blocks that are not on disk, for this process alone to compute and `save`.

        Waits while another process computes; of several jobs that need the same, one does the work. The processes of
        one job enter and leave together, and its first one holds the lock.
        """
        with ExitStack() as held:

            def absent() -> set[int]:
                if self.finished_blocks() >= set(blocks):
                    return set()
                held.enter_context(exclusively(self.folder / "lock.json", "calibration"))
                return set(blocks) - self.finished_blocks()

            yield distributed.on_main(absent)
            distributed.wait()

    def save(self, block: int, results: BlockResults) -> None:
        """Write one block's results, ``{linear name: {quantity: tensor}}``; of several processes, the first does."""
        if not launcher.is_main():
            return
        flat = {
            f"{linear}|{quantity}": tensor.contiguous()
            for linear, quantities in results.items()
            for quantity, tensor in quantities.items()
        }
        _write_atomically(self._path(block), lambda path: save_file(flat, path))

    def load(self, block: int) -> BlockResults:
        """Read one block's results back."""
        results: BlockResults = {}
        for name, tensor in load_file(self._path(block)).items():
            linear, quantity = name.split("|")
            results.setdefault(linear, {})[quantity] = tensor
        return results

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)
