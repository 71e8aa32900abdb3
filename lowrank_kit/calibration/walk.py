"""The one place where a model's blocks are run by themselves, one after another.

A walk takes all batches through a block before it goes on to the next, so that one block's weights and statistics are
enough at a time; the hidden states between the blocks wait in a `Hidden`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.entrance import BlockCall, Entrance, Entry
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, no_grad, torch
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.modes import evaluating
from lowrank_kit.models.streamed import weights_of

Reads = Mapping[str, Callable[[int, Tensor], None]]
"""By module path: told the number of the batch, and the tensor that the module reads."""

Writes = Mapping[str, Callable[[int, Tensor, Tensor], None]]
"""By module path: told the number of the batch, the tensor that the module reads, and the one that it gives."""


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
        self.entrance = Entrance(model, layout)
        self._kept = Hidden(model.device)
        self._weights = weights_of(model)
        self._starts: list[int] = []
        self._modules = [model.get_submodule(path) for path in layout.blocks]
        self._entries: dict[int, Entry] = {}
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
                for index in self.layout.blocks_of(stack):
                    block = self.reach(index)
                    with self._weights.block(index):
                        yield block
                        if index == until:
                            return
                        if not block.is_passed:
                            block.pass_on()

    def reach(self, index: int) -> "Block":
        """A block, with all batches before it if those before it were passed on: for a walk beside another one."""
        stack = self.layout.stack_of(index)
        if index == self.layout.blocks_of(stack)[0]:
            self._enter(stack)
        return Block(self, index)

    @no_grad
    def run(self, index: int, number: int, hidden: Tensor, module: "nn.Module | None" = None) -> Tensor:
        """The hidden state that a block makes of another one; ``module`` takes the block's place."""
        return self.run_with(index, number, self.call(index, number), hidden, module)

    def call(self, index: int, number: int) -> BlockCall:
        """What a block reads beside the hidden states."""
        return self._entries[number].calls[index - self.layout.blocks_of(self.layout.stack_of(index))[0]]

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
        start = self.start(index)
        with nullcontext() if start is None else self.entrance.handed_over(range(start), self._kept[start, number]):
            yield

    def run_with(
        self, index: int, number: int, call: BlockCall, hidden: Tensor, module: "nn.Module | None" = None
    ) -> Tensor:
        """As `run`, with these arguments, and with a graph where gradients are enabled."""
        self._number = number
        output = (module or self._modules[index])(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _enter(self, stack: int) -> None:
        """Bring all batches before the first block of a stack."""
        with torch.no_grad(), self._weights.block(self.layout.blocks_of(stack)[0]):
            for number in self.numbers:
                below = (self.states[number], self._entries[number]) if stack else None
                hidden, self._entries[number] = self.entrance.record(stack, self.on_device(number), below)
                self.states[number] = hidden

    def start(self, index: int) -> int | None:
        """The nearest block up to this one of which hidden states were kept."""
        return max((start for start in self._starts if start <= index), default=None)

    def on_device(self, number: int) -> dict[str, Tensor]:
        """A batch on the model's device."""
        return {name: values.to(self.model.device) for name, values in self.batches[number].items()}

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
        walk, dtype = self.walk, next(self.module.parameters()).dtype
        call = walk.call(self.index, number).in_dtype(dtype)
        return walk.run_with(self.index, number, call, walk.states[number].to(dtype))

    def pass_on(self) -> None:
        """Take all batches to the next block."""
        states = self.walk.states
        for number in self.walk.numbers:
            states.prefetch(number + 1)
            states[number] = self.run(number)
        self.is_passed = True
