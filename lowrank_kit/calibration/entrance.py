"""How a model enters a stack of its blocks, and what it calls each of them with."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

from lowrank_kit.calibration.batches import Batch
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.models.forward import forward_replaced
from lowrank_kit.models.layout import ModelLayout


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block was called with, less its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def in_dtype(self, dtype: "torch.dtype") -> "BlockCall":
        """The same, its floating-point tensors (rotary embeddings, masks) in this dtype."""
        from torch.utils._pytree import tree_map

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return BlockCall(*tree_map(cast, (self.args, self.kwargs)))


@dataclass(frozen=True)
class Entry:
    """How the model calls a stack's blocks for one batch.

    ``calls`` are every block's arguments but its hidden states. ``beside`` is what the blocks return beside these;
    None: the hidden states alone, not in a tuple.
    """

    calls: list[BlockCall]
    beside: tuple[Any, ...] | None


class Entrance:
    """The model's own way into the stacks of its blocks."""

    def __init__(self, model: PreTrainedModel, layout: ModelLayout) -> None:
        self._model, self._layout = model, layout
        self._modules = [model.get_submodule(path) for path in layout.blocks]
        self._returns_tuple: dict[int, bool] = {}

    def record(self, stack: int, batch: Batch, below: tuple[Tensor, Entry] | None) -> tuple[Tensor, Entry]:
        """The hidden states before a stack, and how the model calls its blocks.

        ``below`` is what is known of the stack below: the hidden states behind it, and how it was called.

        Masks and positions may differ from block to block (sliding windows, T5's shared position bias), so the model
        itself builds them: its blocks are replaced by ones that note their arguments and hand the hidden states
        through. The first is run where it returns more than them (T5's bias), for that goes into the others' arguments.
        """
        blocks = self._layout.blocks_of(stack)
        hidden: list[Tensor] = []
        calls: list[BlockCall] = []
        beside: list[tuple[Any, ...]] = []

        def recorder(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                calls.append(BlockCall(args, kwargs))
                if index == blocks[0]:
                    hidden.append(hidden_states)
                    if self._returns_tuple.get(stack, True):
                        with torch.no_grad():
                            output = original(hidden_states, *args, **kwargs)
                        self._returns_tuple[stack] = isinstance(output, tuple)
                        beside.extend([output[1:]] if isinstance(output, tuple) else [])
                if index == blocks[-1]:
                    raise _LastBlockReached
                return (hidden_states, *beside[0]) if beside else hidden_states

            return forward

        no_cache = {"use_cache": False} if "use_cache" in signature(self._model.forward).parameters else {}
        with ExitStack() as held, suppress(_LastBlockReached):
            if below is not None:
                held.enter_context(self.handed_over(self._layout.blocks_of(stack - 1), below[0], below[1].beside))
            for index in blocks:
                module = self._modules[index]
                held.enter_context(forward_replaced(module, recorder(index, module.forward)))
            self._model(**batch, **no_cache)
        return hidden[0], Entry(calls, beside[0] if beside else None)

    @contextmanager
    def handed_over(
        self, blocks: Collection[int], known: Tensor, beside: tuple[Any, ...] | None = None
    ) -> Iterator[None]:
        """Let these blocks compute nothing and hand over what is known behind them."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return known if beside is None else (known, *beside)

        with ExitStack() as stack:
            for index in blocks:
                stack.enter_context(forward_replaced(self._modules[index], forward))
            yield


class _LastBlockReached(Exception):
    """Unwinds a forward pass: what follows the blocks need not be computed."""
