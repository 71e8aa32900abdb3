"""Blocks that a correction has finished, on disk, so that a killed run goes on behind them.

Those of a model that is streamed are the shards of its new checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_kit.deferred import Tensor
from lowrank_kit.files import write_whole
from lowrank_kit.models.streamed import Resident
from lowrank_kit.models.weight_files import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

MADE_OF = "made_of"


class FinishedBlocks:
    """Blocks by index, and what is begun of one more.

    Args:
        folder: where they lie; made when the first is kept. None: nothing is kept.
        made_of: what they depend on. Those of anything else are not there.
        weights: where the model's weights are.
    """

    def __init__(self, folder: Path | None, made_of: str, weights: Resident) -> None:
        self._folder, self._made_of, self._weights = folder, made_of, weights
        weights.go_on(made_of)

    def __contains__(self, index: int) -> bool:
        return self._weights.is_written(index) or self._read(f"block-{index}") is not None

    def restore(self, index: int, block: "nn.Module", device: "torch.device") -> None:
        """Give a block, which has the form it was kept in, its weights."""
        found = self._weights.written(index) or self._read(f"block-{index}")
        assert found is not None
        block.load_state_dict({name: tensor.to(device) for name, tensor in found.items()}, assign=True)

    def keep(self, index: int, block: "nn.Module") -> None:
        """Keep a block, and forget what was begun of it. Raises `LowRankKitError` where the disk is full."""
        if self._weights.is_streamed:
            self._weights.write(index)
        else:
            self._write(f"block-{index}", block.state_dict())
        if self._folder is not None:
            (self._folder / f"begun-{index}.safetensors").unlink(missing_ok=True)

    def begun(self, index: int) -> Mapping[str, Tensor] | None:
        """What `begin` kept last of this block."""
        return self._read(f"begun-{index}")

    def begin(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Keep what a block's work needs to be gone on with. Raises `LowRankKitError` where the disk is full."""
        self._write(f"begun-{index}", state)

    def _read(self, name: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        if self._folder is None:
            return None
        try:
            with safe_open(self._folder / f"{name}.safetensors", framework="pt") as opened:
                if (opened.metadata() or {}).get(MADE_OF) != self._made_of:
                    return None
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        held = {key: t.detach().contiguous() for key, t in tensors.items()}
        write_whole(
            self._folder / f"{name}.safetensors", lambda path: save_tensors(held, path, {MADE_OF: self._made_of})
        )
