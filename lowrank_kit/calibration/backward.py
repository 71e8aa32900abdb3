"""Backwards through the blocks of a model, one after another, from the loss of every batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.entrance import BlockCall, Entry
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.models.blocks import check_stand_alone
from lowrank_kit.models.modes import frozen
from lowrank_kit.models.streamed import weights_of

Loss = Callable[[int, Batch], Tensor | None]
"""Told the number of a batch and the batch on the model's device, runs the model, which computes no more than what
stands above the blocks, and gives a scalar; None: nothing is to be learnt from this batch."""

ACTIVATION_BYTES = 2 * 2**30
"""Activations of a batch, about, that may wait for the backward pass; blocks for which this has no room recompute."""

BACKWARD = "backward pass block by block"


def backward(
    walk: BlockWalk, loss: Loss, lowest: int = 0, on_batch: Callable[[], object] = lambda: None
) -> Iterator[int]:
    """Run every batch of a walk forwards, and backwards from its loss down to the block ``lowest``.

    Yields every block from the last one down when no batch has to go through it any more. Blocks below build no
    graph; those for whose activations there is no room (`ACTIVATION_BYTES`) are run again.

    Args:
        walk: where it keeps hidden states, the way begins at them.
        loss: called for every batch before it goes backwards.
        lowest: the first block through which gradients are wanted.
        on_batch: called for every batch that is through.
    """
    check_stand_alone(walk.layout, BACKWARD)
    with frozen(walk.model):
        # A batch at a time holds the least, unless a block's weights have to come for every one of them.
        streamed = weights_of(walk.model).is_streamed
        groups = [list(walk.numbers)] if streamed else [[n] for n in walk.numbers] or [[]]
        for group in groups:
            for index in _Passage(walk, group, lowest).blocks(loss):
                if group == groups[-1]:
                    yield index
            for _ in group:
                on_batch()


class _Passage:
    """Some batches on their way up together, to the loss and back."""

    def __init__(self, walk: BlockWalk, numbers: Sequence[int], lowest: int) -> None:
        self._walk, self._layout, self._lowest = walk, walk.layout, lowest
        self._weights = weights_of(walk.model)
        self._before = Hidden(walk.model.device)
        self._ways = {number: _Way(walk.on_device(number)) for number in numbers}

    def blocks(self, loss: Loss) -> Iterator[int]:
        """Go there and back; yields the blocks from the last one down, each when all batches are through it."""
        layout, lowest = self._layout, self._lowest
        for stack in range(len(layout.stacks)):
            self._go_up(stack)
        for number, way in self._ways.items():
            with torch.enable_grad(), ExitStack() as known:
                for stack, entry in enumerate(way.entries):
                    blocks = layout.blocks_of(stack)
                    known.enter_context(self._walk.entrance.handed_over(blocks, way.ends[stack], entry.beside))
                total = loss(number, way.batch)
            if total is not None:
                total.backward()
                way.gradient = way.ends[-1].grad
        for stack in reversed(range(len(layout.stacks))):
            blocks = layout.blocks_of(stack)
            for index in range(blocks[-1], max(lowest, blocks[0]) - 1, -1):
                with self._weights.block(index):
                    for number, way in self._ways.items():
                        self._step_back(index, number, way)
                    yield index
            if lowest < blocks[0]:
                for way in self._ways.values():
                    way.leave_stack(stack)

    def _step_back(self, index: int, number: int, way: "_Way") -> None:
        """From the gradient behind a block to that before it."""
        if way.gradient is not None:
            before, output = way.graphs.pop(index, None) or self._graph(index, number, way)  # type: ignore[arg-type]
            torch.autograd.backward(output, way.gradient)
            way.gradient = before.grad
        del self._before[index, number]

    def _go_up(self, stack: int) -> None:
        """Pass a stack, keeping the hidden states before the blocks from the lowest on, and graphs of the last."""
        walk, lowest = self._walk, self._lowest
        blocks, start, states = self._layout.blocks_of(stack), walk.start(lowest), walk.states
        with torch.set_grad_enabled(lowest < blocks[0]), self._weights.block(blocks[0]):
            for number, way in self._ways.items():
                below = (way.ends[-1], way.entries[-1]) if stack else None
                hidden, entry = walk.entrance.record(stack, way.batch, below)
                way.entries.append(entry)
                states[number] = hidden if start is None else walk.kept(start, number)
        for index in blocks[start or 0 :]:
            with self._weights.block(index):
                for number, way in self._ways.items():
                    if index >= lowest:
                        self._before[index, number] = states[number]
                    if index >= max(lowest, len(self._layout.blocks) - self._blocks_with_room(way.batch)):
                        way.graphs[index] = self._graph(index, number, way)
                        states[number] = way.graphs[index][1]
                    else:
                        with torch.no_grad():
                            call = way.entries[-1].calls[index - blocks[0]]
                            states[number] = walk.run_with(index, number, call, states[number])
        for number, way in self._ways.items():
            # A copy: the states of the next stack take its place.
            way.ends.append(states[number].clone().requires_grad_())

    def _graph(self, index: int, number: int, way: "_Way") -> tuple[Tensor, Tensor]:
        """The hidden state before a block, as a leaf, and behind it."""
        stack = self._layout.stack_of(index)
        first = self._layout.blocks_of(stack)[0]
        before = self._before[index, number].detach().requires_grad_(index > max(self._lowest, first))
        with torch.enable_grad():
            return before, self._walk.run_with(index, number, way.call(stack, index - first), before)

    def _blocks_with_room(self, batch: Batch) -> int:
        """What waits of a block is about as much as goes in and out of its linears."""
        if self._weights.is_streamed:
            # A graph holds its block's weights.
            return 0
        width = sum(ref.in_features + ref.out_features for ref in self._layout.linears) / len(self._layout.blocks)
        return int(ACTIVATION_BYTES / (batch["input_ids"].numel() * width * self._walk.model.dtype.itemsize))


class _Way:
    """One batch on its way to the loss and back, on the model's device.

    By stack: ``entries``, and ``ends``, the hidden states behind the last block, which want a gradient. By block:
    ``graphs``, the hidden states before it, as leaves, with what the block made of them.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.entries: list[Entry] = []
        self.ends: list[Tensor] = []
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self.gradient: Tensor | None = None
        # What a stack reads of the one below, and the leaf that takes its place in the blocks.
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, stack: int, offset: int) -> BlockCall:
        """A block's arguments; those that want a gradient are leaves, the same for all blocks."""
        call = self.entries[stack].calls[offset]
        return BlockCall(
            tuple(map(self._leaf, call.args)), {name: self._leaf(value) for name, value in call.kwargs.items()}
        )

    def leave_stack(self, stack: int) -> None:
        """Go on with the gradient behind the stack below, from which this one's arguments are made."""
        found = [(argument, leaf.grad) for argument, leaf in self._leaves.values() if leaf.grad is not None]
        if found:
            arguments, gradients = zip(*found, strict=True)
            torch.autograd.backward(arguments, gradients)
        self._leaves.clear()
        self.gradient = self.ends[stack - 1].grad

    def _leaf(self, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return value
        return self._leaves.setdefault(id(value), (value, value.detach().requires_grad_()))[1]
