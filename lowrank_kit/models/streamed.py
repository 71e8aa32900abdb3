"""Models of which one block is in memory at a time: it comes from the checkpoint's shards and goes when it is left.

The model is a skeleton on the meta device; what stands outside its blocks (embedding, final norm, head) is loaded. A
block that was changed is written to a file of the new checkpoint at once. Who runs blocks asks `weights_of` and need
not know whether the model is such a one.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

from lowrank_kit.deferred import PreTrainedModel, PreTrainedTokenizerBase, Tensor, nn, torch
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.weight_files import check_tensors, save_tensors, weight_files

INDEX = "model.safetensors.index.json"
MADE_OF = "made_of"


class Resident:
    """The weights of a model that lies in memory as a whole."""

    is_streamed = False

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Inside, the weights of this block are there."""
        yield

    def go_on(self, made_of: str) -> None:
        """Keep what lies on disk of a new checkpoint that is made of this; remove that of another."""

    def is_written(self, index: int) -> bool:
        """Whether this block of the new checkpoint lies on disk."""
        return False

    def written(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block of the new checkpoint, by their names in the block; empty where none is written."""
        return {}

    def write(self, index: int) -> None:
        """Put a block that was changed, and is there, into the new checkpoint, if that is written block by block."""

    def read(self, name: str) -> Tensor | None:
        """A weight as the checkpoint has it; None: it is in memory."""
        return None


class Shards:
    """The tensors of a checkpoint folder, in safetensors, by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._files[name], self.shapes[name] = file, opened.get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        """A copy, so that nothing of the file stays mapped."""
        return self.mapped(name).clone()

    def mapped(self, name: str) -> Tensor:
        """The file's own bytes: what nobody looks at takes no memory."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)


class Streamed(Resident):
    """The weights of a skeleton.

    Args:
        model: on the meta device, but for what stands outside its blocks.
        layout: its layout.
        shards: the checkpoint.
        dtype: of the weights in memory.
        output: folder in which the blocks of the new checkpoint gather.
    """

    is_streamed = True

    def __init__(
        self, model: PreTrainedModel, layout: ModelLayout, shards: Shards, dtype: "torch.dtype", output: Path
    ) -> None:
        self._model, self._layout, self._shards, self._dtype, self._output = model, layout, shards, dtype, output
        self._device = model.device
        self._users: Counter[int] = Counter()

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """See `Resident`. Whoever enters first loads it, whoever leaves last frees it."""
        self._users[index] += 1
        if self._users[index] == 1:
            self._load(index)
        try:
            yield
        finally:
            self._users[index] -= 1
            if not self._users[index]:
                _forget(self._model.get_submodule(self._layout.blocks[index]))

    def read(self, name: str) -> Tensor | None:
        """See `Resident`."""
        # A head that is tied to the embedding has no weights of its own.
        return self._shards.read(name).to(self._dtype) if name in self._shards.shapes else None

    def go_on(self, made_of: str) -> None:
        """See `Resident`."""
        # Beside the shards: two entries of their metadata would be in any order, and the bytes not always the same.
        note = self._output / MADE_OF
        if not note.is_file() or note.read_text() != made_of:
            shutil.rmtree(self._output, ignore_errors=True)
            self._output.mkdir(parents=True)
            note.write_text(made_of)

    def is_written(self, index: int) -> bool:
        """See `Resident`."""
        try:
            check_tensors(self._output / self._file(index))
        except LowRankKitError:
            return False
        return True

    def written(self, index: int) -> dict[str, Tensor]:
        """See `Resident`."""
        from safetensors.torch import load_file

        if not self.is_written(index):
            return {}
        prefix = f"{self._layout.blocks[index]}."
        found = load_file(self._output / self._file(index))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def write(self, index: int) -> None:
        """See `Resident`. Raises `LowRankKitError` where the disk is full; what was written before is kept."""
        path = self._layout.blocks[index]
        self._write(index, self._model.get_submodule(path).state_dict(prefix=f"{path}."))

    def finish(self, twin: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write all else, with what ``twin`` says of the new model, and move the checkpoint into its place."""
        outside = {
            name: tensor for name, tensor in self._model.state_dict().items() if not name.startswith(self._prefixes)
        }
        for name in self._model.all_tied_weights_keys:
            outside.pop(name, None)
        self._write(len(self._layout.blocks), outside)
        self._write_index()
        with tempfile.TemporaryDirectory() as settings:
            # Elsewhere: transformers removes the shards that it finds and does not know.
            twin.to(self._dtype).save_pretrained(settings, state_dict={})
            if tokenizer is not None:
                tokenizer.save_pretrained(settings)
            for file in Path(settings).iterdir():
                if file.suffix != ".safetensors":
                    shutil.copyfile(file, self._output / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        (self._output / MADE_OF).unlink()
        self._output.replace(folder)

    def _write_index(self) -> None:
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        size = 0
        for index in range(len(self._layout.blocks) + 1):
            file = self._output / self._file(index)
            with safe_open(file, framework="pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), file.name)
            size += file.stat().st_size
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self._output / INDEX).write_text(json.dumps(content, indent=2) + "\n")

    @property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self._layout.blocks)

    def _file(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._layout.blocks) + 1:05d}.safetensors"

    def _write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        file = self._output / self._file(index)
        temporary = file.with_suffix(".tmp")
        save_tensors(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"}
        )
        temporary.replace(file)

    def _load(self, index: int) -> None:
        path = self._layout.blocks[index]
        block = self._model.get_submodule(path)
        found = {}
        for name in block.state_dict():
            tensor = self.read(f"{path}.{name}")
            assert tensor is not None
            found[name] = tensor.to(self._device)
        block.load_state_dict(found, assign=True)


def weights_of(model: PreTrainedModel) -> Resident:
    """Where the weights of a model are."""
    return _STREAMED.get(model, _RESIDENT)


_RESIDENT = Resident()
_STREAMED: "WeakKeyDictionary[PreTrainedModel, Streamed]" = WeakKeyDictionary()


def stream(
    model: PreTrainedModel,
    layout: ModelLayout,
    folder: Path,
    dtype: "torch.dtype",
    output: Path,
    device: "torch.device",
) -> None:
    """Make a skeleton a streamed model of the checkpoint in ``folder``.

    Raises `LowRankKitError` where the checkpoint is not the model's, `ConfigError` where it cannot be streamed.
    """
    from lowrank_kit.models.whole import check_whole

    if model._keep_in_fp32_modules and dtype != torch.float32:
        raise ConfigError("runtime.weights=streamed holds all weights in one dtype, and this model some in float32")
    shards, prefixes = Shards(folder), tuple(f"{path}." for path in layout.blocks)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        wanted.pop(name, None)
        shards.shapes.pop(name, None)
    info = {
        "missing_keys": wanted.keys() - shards.shapes.keys(),
        "unexpected_keys": shards.shapes.keys() - wanted.keys(),
        "mismatched_keys": [
            (name, shards.shapes[name], shape)
            for name, shape in wanted.items()
            if shards.shapes.get(name, shape) != shape
        ],
    }
    check_whole(model, "causal", info, str(folder))
    _forget(model, dtype)
    _make_buffers(model, device)
    for name in wanted:
        if not name.startswith(prefixes):
            _put(model, name, shards.mapped(name).to(device, dtype))
    model.tie_weights()
    model.config.dtype = dtype
    _STREAMED[model] = Streamed(model.eval(), layout, shards, dtype, output)


def _put(model: "nn.Module", name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor)
    else:
        owner._buffers[leaf] = tensor


def _make_buffers(model: PreTrainedModel, device: "torch.device") -> None:
    """Compute what no checkpoint holds, such as rotary frequencies, as transformers does when it loads a model."""
    stored = model.state_dict().keys()
    for path, module in model.named_modules():
        lost = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and f"{path}.{name}" not in stored
        }
        for name, buffer in lost.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if lost:
            model._init_weights(module)


def _forget(part: "nn.Module", dtype: "torch.dtype | None" = None) -> None:
    """Leave shapes alone of weights, and the dtype, unless they get another."""
    stored = part.state_dict().keys()
    for path, module in part.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta", dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{path}.{name}".lstrip(".") in stored:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
