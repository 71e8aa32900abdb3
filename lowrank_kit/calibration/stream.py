"""Activation statistics block by block, in memory that does not grow with depth.

Blocks are visited in order. Only the current block's moments are held; the hidden states between
blocks wait on the CPU. Peak memory = model + hidden states + one block's moments + one batch.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

from lowrank_kit import distributed
from lowrank_kit.calibration.statistics import LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.texts import measured
from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.experts import tokens_of
from lowrank_kit.models.forward import forward_replaced
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.spectral.moments import Moments

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenMasks:
    """``[rows, tokens]`` masks of a batch: of the stack's own tokens and of the encoder's; None where all are real."""

    own: Tensor | None
    source: Tensor | None


def stream_statistics(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    request: StatisticsRequest,
    refs: Collection[LinearRef],
    skip: Collection[int] = (),
    opening: int = 0,
) -> Iterator[tuple[int, list[LayerStatistics]]]:
    """Yield ``(block index, statistics of its linears)`` in execution order.

    Args:
        model: in evaluation mode while the generator runs; left as it was found.
        layout: the model's layout.
        batches: ``[rows, tokens]`` model inputs with their attention masks; padded positions are not counted. Of
            several processes each reads its `distributed.share`, and all get the moments of all batches.
        request: which side's moments to collect.
        refs: the linears wanted; blocks without any only pass their hidden states on.
        skip: block indices whose statistics are known already; they pass their hidden states on.
        opening: tokens at the beginning of every row that are read and not counted (BOS).
    """
    wanted = defaultdict(list)
    for ref in refs:
        if ref.block not in skip:
            wanted[ref.block].append(ref)
    was_training = model.training
    model.eval()
    batches = distributed.share(batches)
    try:
        first = 0
        for stack in layout.stacks:
            last = max((b for b in wanted if first <= b < first + len(stack)), default=None)
            if last is not None:
                blocks = stack[: last - first + 1]
                yield from _stream_stack(model, blocks, first, batches, request, wanted, opening)
            first += len(stack)
    finally:
        model.train(was_training)


def _stream_stack(
    model: PreTrainedModel,
    stack: Sequence[str],
    first: int,
    batches: Sequence[Batch],
    request: StatisticsRequest,
    wanted: Mapping[int, list[LinearRef]],
    opening: int,
) -> Iterator[tuple[int, list[LayerStatistics]]]:
    device = model.device
    blocks = [model.get_submodule(path) for path in stack]
    own = "decoder_attention_mask" if first > 0 else "attention_mask"
    calls = [record_calls(model, blocks, {k: v.to(device) for k, v in batch.items()}) for batch in batches]
    masks = [
        TokenMasks(_counted(batch.get(own), opening), _counted(batch.get("attention_mask"), opening))
        for batch in batches
    ]
    for offset, block in enumerate(blocks):
        linears = wanted.get(first + offset, [])
        is_last = offset == len(blocks) - 1
        with MomentCollector(model, linears, request) as collector, torch.no_grad():
            for (hidden, arguments), mask in zip(calls, masks, strict=True):
                collector.masks = mask
                call = arguments[offset]
                output = block(hidden[0].to(device), *call.args, **call.kwargs)
                if not is_last:
                    # In place: a new tensor a batch and block would leave the heap in pieces.
                    hidden[0].copy_(output[0] if isinstance(output, tuple) else output)
        if linears:
            collector.add_up()
            yield first + offset, collector.statistics()
        # Else it would hold this block's moments while the next block's are summed.
        del collector


def _counted(mask: Tensor | None, opening: int) -> Tensor | None:
    return None if mask is None else measured(mask, opening)


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block was called with, less its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _LastBlockReached(Exception):
    """Unwinds a forward pass: what follows the blocks need not be computed."""


def record_calls(
    model: PreTrainedModel, blocks: "Sequence[nn.Module]", batch: Batch
) -> tuple[list[Tensor], list[BlockCall]]:
    """Return the hidden states before the first block, in a list of one, and every block's other arguments.

    Masks and positions may differ from block to block (sliding windows, T5's shared position bias), so the model
    itself builds them: its blocks are replaced by ones that note their arguments and hand the hidden states
    through. Only the first is run, because what it returns beside them (T5's bias) goes into the others' arguments.
    """
    hidden: list[Tensor] = []
    calls: list[BlockCall] = []
    extras: list[Any] = []

    def recorder(index: int, block: "nn.Module") -> Callable[..., Any]:
        original = block.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(BlockCall(args, kwargs))
            if index == 0:
                hidden.append(hidden_states.cpu())
            if index == len(blocks) - 1:
                raise _LastBlockReached
            if index == 0:
                extras.append(original(hidden_states, *args, **kwargs))
            first_output = extras[0]
            return (hidden_states, *first_output[1:]) if isinstance(first_output, tuple) else hidden_states

        return forward

    no_cache = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    with ExitStack() as stack, torch.no_grad(), suppress(_LastBlockReached):
        for index, block in enumerate(blocks):
            stack.enter_context(forward_replaced(block, recorder(index, block)))
        model(**batch, **no_cache)
    return hidden, calls


class MomentCollector:
    """Hooks that sum moments of some linears' inputs or outputs while it is entered, and magnitudes of inputs.

    Linears of one input group read the same tensor: its moments are summed once. For ``smaller`` a group's input
    is chosen when its Gram is cheaper than those of its linears' outputs together.
    """

    def __init__(self, model: "nn.Module", refs: Sequence[LinearRef], request: StatisticsRequest) -> None:
        self.masks = TokenMasks(None, None)
        self._model, self._request = model, request
        self._groups: dict[str, list[LinearRef]] = defaultdict(list)
        for ref in refs:
            self._groups[ref.input_group].append(ref)
        side = request.moments
        self._by_input = {
            name: side == "input"
            or (side == "smaller" and group[0].in_features ** 2 < sum(r.out_features**2 for r in group))
            for name, group in self._groups.items()
        }
        self._inputs: dict[str, Moments] = {}
        self._outputs: dict[str, Moments] = {}
        self._magnitudes: dict[str, Magnitudes] = {}

    def __enter__(self) -> "MomentCollector":
        device = next(self._model.parameters()).device
        self._handles = []
        for name, group in self._groups.items():
            first = self._model.get_submodule(group[0].name)
            if self._request.magnitudes:
                self._magnitudes[name] = Magnitudes(group[0].in_features, device)
                hook = self._input_hook(group[0], self._magnitudes[name])
                self._handles.append(first.register_forward_pre_hook(hook))
            if self._by_input[name]:
                self._inputs[name] = Moments.zeros(group[0].in_features, device)
                self._handles.append(first.register_forward_pre_hook(self._input_hook(group[0], self._inputs[name])))
            elif self._request.moments is not None:
                for ref in group:
                    self._outputs[ref.name] = Moments.zeros(ref.out_features, device)
                    output_hook = self._output_hook(ref, self._outputs[ref.name])
                    self._handles.append(self._model.get_submodule(ref.name).register_forward_hook(output_hook))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add_up(self) -> None:
        """Take in what the other processes collected from their batches."""
        if distributed.size() == 1:
            return
        for moments in (*self._inputs.values(), *self._outputs.values()):
            distributed.add_up(moments.gram, moments.total)
            moments.count = int(distributed.total(moments.count))
        for magnitude in self._magnitudes.values():
            distributed.add_up(magnitude.total)
            magnitude.count = int(distributed.total(magnitude.count))

    def statistics(self) -> list[LayerStatistics]:
        """What was collected, a record for every linear."""
        found = []
        for name, group in self._groups.items():
            magnitude = self._magnitudes[name].mean() if name in self._magnitudes else None
            for ref in group:
                if self._by_input[name]:
                    found.append(LayerStatistics(ref, "input", self._inputs[name], magnitude))
                else:
                    moments = self._outputs.get(ref.name) or Moments.zeros(0)
                    found.append(LayerStatistics(ref, "output", moments, magnitude))
        return found

    def _input_hook(self, ref: LinearRef, sums: "Moments | Magnitudes") -> Callable[..., None]:
        def hook(_module: "nn.Module", inputs: tuple[Tensor, ...]) -> None:
            self._update(ref, sums, inputs[0])

        return hook

    def _output_hook(self, ref: LinearRef, moments: Moments) -> Callable[..., None]:
        def hook(_module: "nn.Module", _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._update(ref, moments, output)

        return hook

    def _update(self, ref: LinearRef, sums: "Moments | Magnitudes", activations: Tensor) -> None:
        # Of the encoder's hidden states, the encoder's mask tells which tokens are real.
        mask = self.masks.source if ref.of_source else self.masks.own
        if mask is not None and ref.expert is not None:
            mask = mask.flatten()[tokens_of(self._model, ref)]
        try:
            sums.update(activations, None if mask is None else mask.reshape(activations.shape[:-1]))
        except ValueError as error:
            raise LowRankKitError(f"calibration of {ref.name}: {error}") from error


class Magnitudes:
    """Mean absolute value of every channel."""

    def __init__(self, width: int, device: "torch.device") -> None:
        self.total, self.count = torch.zeros(width, dtype=torch.float64, device=device), 0

    def update(self, activations: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; rows where ``mask`` is zero are left out."""
        rows = activations.reshape(-1, self.total.shape[0]) if mask is None else activations[mask.bool()]
        self.total += rows.abs().sum(0, dtype=torch.float64)
        self.count += rows.shape[0]

    def mean(self) -> Tensor:
        """By channel."""
        return self.total / self.count
