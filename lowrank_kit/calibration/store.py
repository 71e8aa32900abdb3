"""A cache of calibration results, keyed by everything that they depend on, one file a block."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lowrank_kit import distributed, launcher
from lowrank_kit.cache.entry import LOCK_FILE, make_room, open_entry, touch
from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import write_whole
from lowrank_kit.lock import exclusively
from lowrank_kit.models.weight_files import save_tensors

log = logging.getLogger(__name__)

BlockResults = dict[str, dict[str, Tensor]]

CHECKSUM = "blake2b"


class CalibrationStore:
    """Results of calibration on disk; a killed run finds the blocks it had finished, and other runs find them too.

    Every file carries a checksum of its key, its block and its tensors. A damaged one is made again.

    Args:
        root: the folder of all caches.
        key: everything that the results depend on. Two different keys never share a file.
    """

    def __init__(self, root: Path, key: StatisticsKey) -> None:
        self.root, self.key = root, key
        self.folder = open_entry(root, key.digest, key.description)
        self._whole: set[int] = set()

    def finished_blocks(self) -> set[int]:
        """Indices of the blocks that lie on disk, unread."""
        return {int(path.stem.removeprefix("block-")) for path in self.folder.glob("block-*.safetensors")}

    @contextmanager
    def missing(self, blocks: Collection[int]) -> Iterator[set[int]]:
        """Yield those of these blocks that are not whole on disk, for this process alone to compute and `save`.

        Waits while another process computes; of several jobs that need the same, one does the work. The processes of
        one job enter and leave together, and its first one holds the lock. Results beyond the cache's limit push out
        the least recently used ones.
        """
        with ExitStack() as held:

            def absent() -> set[int]:
                if not (lacking := self._not_whole(blocks)):
                    return set()
                held.enter_context(exclusively(self.folder / LOCK_FILE, "calibration"))
                held.callback(make_room, self.root)
                return self._not_whole(lacking)

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
        write_whole(self._path(block), lambda path: save_tensors(flat, path, {CHECKSUM: self._checksum(block, flat)}))
        touch(self.folder)
        self._whole.add(block)

    def load(self, block: int) -> BlockResults:
        """One block's results. Raises `LowRankKitError` for a damaged file.

        Tensors are mapped, so that what nobody reads takes no memory; what was read does, as long as there is one of
        the block's tensors.
        """
        touch(self.folder)
        results: BlockResults = {}
        for name, tensor in self._read(block).items():
            linear, quantity = name.split("|")
            results.setdefault(linear, {})[quantity] = tensor
        return results

    def _not_whole(self, blocks: Collection[int]) -> set[int]:
        lacking = set(blocks) - self.finished_blocks()
        for block in set(blocks) - lacking:
            try:
                self._read(block)
            except LowRankKitError as error:
                log.warning("%s: it is made again", error)
                self._path(block).unlink(missing_ok=True)
                lacking.add(block)
        return lacking

    def _read(self, block: int) -> dict[str, Tensor]:
        """Read a file; the checksum is compared once a store."""
        from safetensors import SafetensorError, safe_open

        path = self._path(block)
        try:
            with safe_open(path, framework="pt") as file:
                expected, flat = (file.metadata() or {}).get(CHECKSUM), file.get_tensors()
        except FileNotFoundError as error:
            raise LowRankKitError(f"the cached results in {path} were removed: start the run again") from error
        except SafetensorError as error:
            raise LowRankKitError(f"the cached results in {path} are damaged ({error})") from error
        if block not in self._whole:
            if self._checksum(block, flat) != expected:
                raise LowRankKitError(f"the cached results in {path} are damaged (their checksum is another)")
            self._whole.add(block)
        return flat

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def _checksum(self, block: int, tensors: Mapping[str, Tensor]) -> str:
        whole = hashlib.blake2b(f"{self.key.digest} {block}\n".encode(), digest_size=16)
        for name, tensor in sorted(tensors.items()):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return whole.hexdigest()
