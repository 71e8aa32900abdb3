"""The one place where a model's blocks are run by themselves: forwards block by block, and backwards.

A walk takes all batches through a block before it goes on to the next, so that one block's weights and statistics are
enough at a time; the hidden states between the blocks wait in a `Hidden`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, no_grad, torch
from lowrank_kit.models.blocks import check_stand_alone
from lowrank_kit.models.forward import forward_replaced
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.streamed import weights_of

Batch = Mapping[str, Tensor]

Reads = Mapping[str, Callable[[int, Tensor], None]]
"""By module path: told the number of the batch, and the tensor that the module reads."""

Writes = Mapping[str, Callable[[int, Tensor, Tensor], None]]
"""By module path: told the number of the batch, the tensor that the module reads, and the one that it gives."""

Loss = Callable[[int, Batch], Tensor | None]
"""Told the number of a batch and the batch on the model's device, runs the model, which computes no more than what
stands above the blocks, and gives a scalar; None: nothing is to be learnt from this batch."""

ACTIVATION_BYTES = 2 * 2**30
"""Activations of a batch, about, that may wait for the backward pass; blocks for which this has no room recompute."""

BACKWARD = "backward pass block by block"


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block was called with, less its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """How the model calls a stack's blocks for one batch.

    ``calls`` are every block's arguments but its hidden states. ``beside`` is what the blocks return beside these;
    None: the hidden states alone, not in a tuple.
    """

    calls: list[BlockCall]
    beside: tuple[Any, ...] | None


class BlockWalk:
    """Batches on their way through the blocks of a model.

    ``states[number]`` is the hidden state ``[rows, tokens, hidden]`` of a batch before the block that it comes to.

    Args:
        model: its weights may change while it is walked through.
        layout: its layout.
        batches: ``[rows, tokens]`` model inputs.
        states: where hidden states wait; None: as the limits of `Hidden` say.
    """

    def __init__(
        self, model: PreTrainedModel, layout: ModelLayout, batches: Sequence[Batch], states: Hidden | None = None
    ) -> None:
        self.model, self.layout, self.batches = model, layout, batches
        self.states = Hidden(model.device) if states is None else states
        self._kept = Hidden(model.device)
        self._before = Hidden(model.device)
        self._weights = weights_of(model)
        self._starts: list[int] = []
        self._modules = [model.get_submodule(path) for path in layout.blocks]
        self._entries: dict[int, Entry] = {}
        self._returns_tuple: dict[int, bool] = {}
        self._number = 0

    @property
    def numbers(self) -> range:
        """Of the batches."""
        return range(len(self.batches))

    def forward(self, until: int | None = None) -> Iterator["Block"]:
        """Yield the blocks in execution order, the last one ``until``; the model is in evaluation mode meanwhile.

        Whoever passes the block on (`Block.pass_on`) before changing it lets later blocks read what the original gives.
        Where nobody does, the walk does so when it is asked for the next block, with the block as it is then: later
        blocks read what the changed model gives.
        """
        with evaluating(self.model):
            for stack in range(len(self.layout.stacks)):
                blocks = self._blocks_of(stack)
                self._enter(stack)
                for index in blocks:
                    block = Block(self, index)
                    with self._weights.block(index):
                        yield block
                        if index == until:
                            return
                        if not block.is_passed:
                            block.pass_on()

    @no_grad
    def run(self, index: int, number: int, hidden: Tensor, module: "nn.Module | None" = None) -> Tensor:
        """The hidden state that a block makes of another one; ``module`` takes the block's place."""
        return self._run(index, number, self.call(index, number), hidden, module)

    def call(self, index: int, number: int) -> BlockCall:
        """What a block reads beside the hidden states."""
        return self._entries[number].calls[index - self._blocks_of(self._stack_of(index))[0]]

    @contextmanager
    def watching(self, reads: Reads | None = None, writes: Writes | None = None) -> Iterator[None]:
        """Tell what modules read and give whenever a batch passes them."""
        with ExitStack() as stack:
            for name, note in (reads or {}).items():
                hook = self.model.get_submodule(name).register_forward_pre_hook(self._read_hook(note))
                stack.callback(hook.remove)
            for name, tell in (writes or {}).items():
                hook = self.model.get_submodule(name).register_forward_hook(self._write_hook(tell))
                stack.callback(hook.remove)
            yield

    def keep(self, blocks: Collection[int]) -> None:
        """Run up to the last of these blocks and keep the hidden states before each, so that passes may begin there.

        The number of blocks stands for behind the last one. States hold as long as no block before the one in question
        changes. Only in models of one stack.
        """
        for block in self.forward(until=max(blocks)):
            self._keep(block.index, blocks)
        self._keep(len(self._modules), blocks)
        self._starts = sorted(blocks)

    def _keep(self, index: int, blocks: Collection[int]) -> None:
        if index in blocks:
            for number in self.numbers:
                self._kept[index, number] = self.states[number]

    def kept(self, index: int, number: int) -> Tensor:
        """The hidden state of a batch before a block, or behind the last one, that `keep` was told to keep."""
        return self._kept[index, number]

    @contextmanager
    def begun(self, number: int, index: int) -> Iterator[None]:
        """The model's own passes of a batch begin at the nearest block up to this one of which states were kept."""
        start = self._start(index)
        with ExitStack() as stack:
            if start is not None:
                self._hand_over(stack, range(start), self._kept[start, number], None)
            yield

    def backward(self, loss: Loss, lowest: int = 0, on_batch: Callable[[], object] = lambda: None) -> Iterator[int]:
        """Run every batch forwards, and backwards from its loss down to the block ``lowest``.

        Yields every block from the last one down when no batch has to go through it any more. Blocks below build no
        graph; those for whose activations there is no room (`ACTIVATION_BYTES`) are run again.

        Args:
            loss: called for every batch before it goes backwards.
            lowest: the first block through which gradients are wanted.
            on_batch: called for every batch that is through.
        """
        check_stand_alone(self.layout, BACKWARD)
        with frozen(self.model):
            # A batch at a time holds the least, unless a block's weights have to come for every one of them.
            groups = [list(self.numbers)] if self._weights.is_streamed else [[n] for n in self.numbers] or [[]]
            for group in groups:
                for index in self._back(group, loss, lowest):
                    if group == groups[-1]:
                        yield index
                for _ in group:
                    on_batch()

    def _back(self, numbers: Sequence[int], loss: Loss, lowest: int) -> Iterator[int]:
        ways = {number: _Way(self._on_device(number)) for number in numbers}
        for stack in range(len(self.layout.stacks)):
            self._go_up(stack, ways, lowest)
        for number, way in ways.items():
            with torch.enable_grad(), ExitStack() as known:
                for stack, entry in enumerate(way.entries):
                    self._hand_over(known, self._blocks_of(stack), way.ends[stack], entry.beside)
                total = loss(number, way.batch)
            if total is not None:
                total.backward()
                way.gradient = way.ends[-1].grad
        for stack in reversed(range(len(self.layout.stacks))):
            blocks = self._blocks_of(stack)
            for index in range(blocks[-1], max(lowest, blocks[0]) - 1, -1):
                with self._weights.block(index):
                    for number, way in ways.items():
                        self._step_back(index, number, way, lowest)
                    yield index
            if lowest < blocks[0]:
                for way in ways.values():
                    way.leave_stack(stack)

    def _step_back(self, index: int, number: int, way: "_Way", lowest: int) -> None:
        """From the gradient behind a block to that before it."""
        if way.gradient is not None:
            before, output = way.graphs.pop(index, None) or self._graph(index, number, way, lowest)  # type: ignore[arg-type]
            torch.autograd.backward(output, way.gradient)
            way.gradient = before.grad
        del self._before[index, number]

    def _go_up(self, stack: int, ways: Mapping[int, "_Way"], lowest: int) -> None:
        """Pass a stack, keeping the hidden states before the blocks from ``lowest`` on, and graphs of the last."""
        blocks, start = self._blocks_of(stack), self._start(lowest)
        with torch.set_grad_enabled(lowest < blocks[0]), self._weights.block(blocks[0]):
            for number, way in ways.items():
                below = (way.ends[-1], way.entries[-1]) if stack else None
                hidden, entry = self._recorded(stack, way.batch, below)
                way.entries.append(entry)
                self.states[number] = hidden if start is None else self._kept[start, number]
        for index in blocks[start or 0 :]:
            with self._weights.block(index):
                for number, way in ways.items():
                    if index >= lowest:
                        self._before[index, number] = self.states[number]
                    if index >= max(lowest, len(self._modules) - self._blocks_with_room(way.batch)):
                        way.graphs[index] = self._graph(index, number, way, lowest)
                        self.states[number] = way.graphs[index][1]
                    else:
                        with torch.no_grad():
                            call = way.entries[-1].calls[index - blocks[0]]
                            self.states[number] = self._run(index, number, call, self.states[number])
        for number, way in ways.items():
            # A copy: the states of the next stack take its place.
            way.ends.append(self.states[number].clone().requires_grad_())

    def _graph(self, index: int, number: int, way: "_Way", lowest: int) -> tuple[Tensor, Tensor]:
        """The hidden state before a block, as a leaf, and behind it."""
        stack = self._stack_of(index)
        first = self._blocks_of(stack)[0]
        before = self._before[index, number].detach().requires_grad_(index > max(lowest, first))
        with torch.enable_grad():
            return before, self._run(index, number, way.call(stack, index - first), before)

    def _run(
        self, index: int, number: int, call: BlockCall, hidden: Tensor, module: "nn.Module | None" = None
    ) -> Tensor:
        self._number = number
        output = (module or self._modules[index])(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _enter(self, stack: int) -> None:
        """Bring all batches before the first block of a stack."""
        with torch.no_grad(), self._weights.block(self._blocks_of(stack)[0]):
            for number in self.numbers:
                below = (self.states[number], self._entries[number]) if stack else None
                hidden, self._entries[number] = self._recorded(stack, self._on_device(number), below)
                self.states[number] = hidden

    def _recorded(self, stack: int, batch: Batch, below: tuple[Tensor, Entry] | None) -> tuple[Tensor, Entry]:
        """The hidden states before a stack, and how the model calls its blocks.

        ``below`` is what is known of the stack below: the hidden states behind it, and how it was called.

        Masks and positions may differ from block to block (sliding windows, T5's shared position bias), so the model
        itself builds them: its blocks are replaced by ones that note their arguments and hand the hidden states
        through. The first is run where it returns more than them (T5's bias), for that goes into the others' arguments.
        """
        blocks = self._blocks_of(stack)
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

        no_cache = {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
        with ExitStack() as held, suppress(_LastBlockReached):
            if below is not None:
                self._hand_over(held, self._blocks_of(stack - 1), below[0], below[1].beside)
            for index in blocks:
                module = self._modules[index]
                held.enter_context(forward_replaced(module, recorder(index, module.forward)))
            self.model(**batch, **no_cache)
        return hidden[0], Entry(calls, beside[0] if beside else None)

    def _hand_over(
        self, stack: ExitStack, blocks: Collection[int], known: Tensor, beside: tuple[Any, ...] | None
    ) -> None:
        """Let these blocks compute nothing and hand over what is known behind them."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return known if beside is None else (known, *beside)

        for index in blocks:
            stack.enter_context(forward_replaced(self._modules[index], forward))

    def _start(self, index: int) -> int | None:
        """The nearest block up to this one of which hidden states were kept."""
        return max((start for start in self._starts if start <= index), default=None)

    def _blocks_with_room(self, batch: Batch) -> int:
        """What waits of a block is about as much as goes in and out of its linears."""
        if self._weights.is_streamed:
            # A graph holds its block's weights.
            return 0
        width = sum(ref.in_features + ref.out_features for ref in self.layout.linears) / len(self._modules)
        return int(ACTIVATION_BYTES / (batch["input_ids"].numel() * width * self.model.dtype.itemsize))

    def _on_device(self, number: int) -> dict[str, Tensor]:
        return {name: values.to(self.model.device) for name, values in self.batches[number].items()}

    def _blocks_of(self, stack: int) -> range:
        first = sum(len(earlier) for earlier in self.layout.stacks[:stack])
        return range(first, first + len(self.layout.stacks[stack]))

    def _stack_of(self, index: int) -> int:
        return next(stack for stack in range(len(self.layout.stacks)) if index in self._blocks_of(stack))

    def _read_hook(self, note: Callable[[int, Tensor], None]) -> Callable[..., None]:
        def hook(_module: "nn.Module", inputs: tuple[Tensor, ...]) -> None:
            note(self._number, inputs[0])

        return hook

    def _write_hook(self, tell: Callable[[int, Tensor, Tensor], None]) -> Callable[..., None]:
        def hook(_module: "nn.Module", inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tell(self._number, inputs[0], output)

        return hook


@dataclass
class Block:
    """One block, reached by all batches of a walk."""

    walk: BlockWalk
    index: int
    is_passed: bool = False

    @property
    def module(self) -> "nn.Module":
        """The block itself."""
        return self.walk._modules[self.index]

    def run(self, number: int) -> Tensor:
        """The hidden state of a batch behind the block; the batch stays where it is."""
        return self.walk.run(self.index, number, self.walk.states[number])

    def recorded(self, number: int) -> Tensor:
        """As `run`, in the dtype of the block's parameters, and with a graph to them where gradients are enabled."""
        walk = self.walk
        dtype = next(self.module.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        from torch.utils._pytree import tree_map

        call = walk.call(self.index, number)
        args, kwargs = tree_map(cast, (call.args, call.kwargs))
        return walk._run(self.index, number, BlockCall(args, kwargs), cast(walk.states[number]))

    def pass_on(self) -> None:
        """Take all batches to the next block."""
        states = self.walk.states
        for number in self.walk.numbers:
            states.prefetch(number + 1)
            states[number] = self.run(number)
        self.is_passed = True


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


class _LastBlockReached(Exception):
    """Unwinds a forward pass: what follows the blocks need not be computed."""


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode until the end; then the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no parameter wants a gradient, until the end; then everything is as it was."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
