"""Hidden states that wait for a block: on the device, in the machine's memory or on disk, each within its limit."""

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError

DEVICE_BYTES = 2**30
"""What lies on an accelerator, unless its creator says otherwise."""

MEMORY_BYTES = 4 * 2**30
"""What lies in the machine's memory; all that is more lies on disk."""


class Hidden:
    """Tensors by key, of which one or two are at work at a time. A key's tensor is overwritten in place.

    On a CUDA device, what lies in memory is pinned and copied beside the computation; `prefetch` begins to bring a
    tensor back. Files are memory-mapped: the system reads and writes them as it finds room. They are removed with the
    object, and lie in the folder for temporary files (``TMPDIR``).
    """

    def __init__(
        self, device: "torch.device", *, device_bytes: int | None = None, memory_bytes: int | None = None
    ) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        # A CPU is its own memory.
        self._free = {
            "device": 0 if device.type == "cpu" else DEVICE_BYTES if device_bytes is None else device_bytes,
            "memory": MEMORY_BYTES if memory_bytes is None else memory_bytes,
        }
        self._held: dict[Hashable, tuple[str, Tensor]] = {}
        self._coming: dict[Hashable, Tensor] = {}
        self._side = torch.cuda.Stream(device) if self._is_cuda else None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.files = 0

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a copy. Raises `LowRankKitError` where it goes to disk and the disk is full."""
        self._coming.pop(key, None)
        there = self._held.get(key)
        if there is None or there[1].shape != tensor.shape or there[1].dtype != tensor.dtype:
            del self[key]
            there = self._held[key] = self._place(tensor)
        # In place: a new tensor a batch and block would leave the heap in pieces.
        there[1].copy_(tensor.detach(), non_blocking=self._is_cuda)

    def __getitem__(self, key: Hashable) -> Tensor:
        """The tensor on the device. On a CPU it is what is kept, not a copy: do not change it."""
        coming = self._coming.pop(key, None)
        if coming is None or self._side is None:
            return self._held[key][1].to(self._device, non_blocking=self._is_cuda)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        coming.record_stream(current)
        return coming

    def __delitem__(self, key: Hashable) -> None:
        """Forget it, if it is there."""
        self._coming.pop(key, None)
        if key in self._held:
            place, tensor = self._held.pop(key)
            if place in self._free:
                self._free[place] += tensor.nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def prefetch(self, key: Hashable) -> None:
        """Begin to copy a tensor to the device, if it is known and lies elsewhere."""
        if self._side is not None and key in self._held and self._held[key][0] != "device":
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._coming[key] = self._held[key][1].to(self._device, non_blocking=True)

    def _place(self, tensor: Tensor) -> tuple[str, Tensor]:
        """Room for a tensor like this one, at the first place that has it."""
        for place, free in self._free.items():
            if tensor.nbytes <= free:
                self._free[place] -= tensor.nbytes
                if place == "device":
                    return place, torch.empty_like(tensor, device=self._device)
                return place, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_cuda)
        return "disk", self._mapped(tensor)

    def _mapped(self, tensor: Tensor) -> Tensor:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="lowrank_kit-")
        file = Path(self._folder.name, f"{self.files}")
        self.files += 1
        with file.open("wb") as opened:
            # Now, where it can be reported: a disk that is full when a page is written kills the process.
            try:
                os.posix_fallocate(opened.fileno(), 0, tensor.nbytes)
            except OSError as error:
                raise LowRankKitError(
                    f"{tensor.nbytes} bytes of hidden states find no room in '{self._folder.name}' ({error.strerror}): "
                    "make some, or name another folder by TMPDIR"
                ) from error
        mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        # The mapping keeps the file's content alive; with it goes the room on disk.
        file.unlink()
        return mapped.view(tensor.shape)
