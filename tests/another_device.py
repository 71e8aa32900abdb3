"""A device that is the CPU by another name: what is on it is computed here, and may not be mixed with what is not.

Whoever forgets to bring a tensor to the model's device finds out on a GPU alone. Here tensors say that they are on
``elsewhere:0``, and an operation on such a tensor and one of the CPU raises what it does on a GPU. Numbers without
dimensions may come from the CPU, indices too, and copies go anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    """What torch asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("elsewhere", _Backend())
DEVICE = torch.device("elsewhere:0")
aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default, aten.record_stream.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the device; ``held`` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, layout=held.layout, **options)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where that is asked for, and brings others to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor` and its kin, which modes of dispatch do not see: made on the CPU, and brought there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and torch.device(options.get("device") or "cpu").type == DEVICE.type:
            return func(*args, **options | {"device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere) and options.get("device") is None:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | options).to(DEVICE)
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        if func == torch.Tensor.data.__set__ and isinstance(args[1], Elsewhere):
            swap_tensors(args[0], torch.nn.Parameter(Elsewhere(args[1].held), args[0].requires_grad))
            return None
        return func(*args, **options)


def _with_tensors(index: Any) -> Any:
    """An index, its lists as tensors."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list | range) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = kwargs.get("device")
    to_device = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if there:
        _check(func, args, tensors)
    if to_device and (generator := kwargs.get("generator")) is not None and generator.device.type != DEVICE.type:
        raise RuntimeError(f"{func}: expected a 'elsewhere' device type for generator but found 'cpu'")
    if func is aten.record_stream.default:
        return None
    plain = tree_map(_plain, args), tree_map(_plain, kwargs)
    if asked is not None and to_device:
        plain[1]["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        plain[1]["pin_memory"] = False
    found = func(*plain[0], **plain[1])
    if func is aten.copy_.default:
        return args[0]
    if not to_device:
        return found
    wrapped = tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _plain(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Elsewhere) else leaf


def _check(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if func in BETWEEN_DEVICES:
        return
    first, *_ = tensors
    if func in INDEXED and isinstance(first, Elsewhere):
        # Indices may lie on the CPU; what is put there may not, unless it is a number.
        tensors = [first, *(args[2:3] if len(args) > 2 else [])]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    if any(tensor.dim() for tensor in elsewhere) or (elsewhere and first is elsewhere[0] and func._schema.is_mutable):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found two devices, elsewhere:0 and cpu"
        )


@contextmanager
def another_device() -> Iterator[torch.device]:
    """A process with one such device. What torch is told of it cannot be taken back."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    # On this thread: another one has no mode.
    with torch.autograd.set_multithreading_enabled(False), sdpa_kernel(SDPBackend.MATH), _Factories(), _FromNumbers():
        yield DEVICE
