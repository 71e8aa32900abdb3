"""Activation statistics block by block, in memory that does not grow with depth.

Only the current block's moments are held; hidden states wait between blocks as `lowrank_kit.calibration.hidden` says.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from lowrank_kit import distributed
from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.statistics import LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.texts import measured
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.experts import tokens_of
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.streamed import weights_of
from lowrank_kit.spectral.moments import Moments, SampleMoments


@dataclass(frozen=True)
class TokenMasks:
    """``[rows, tokens]`` masks of all batches: of a stack's own tokens, of the encoder's; None where all are real."""

    own: Sequence[Tensor | None]
    source: Sequence[Tensor | None]


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

    Where ``request`` reads no activations, no batch is run and the moments are empty.

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
    if not wanted:
        return
    if not request.reads_activations:
        for index in sorted(wanted):
            with weights_of(model).block(index):
                yield index, [LayerStatistics(ref, "input", Moments.zeros(0)) for ref in wanted[index]]
        return
    batches = distributed.share(batches)
    masks = {True: _masks(batches, "attention_mask", opening, model.device)}
    if len(layout.stacks) > 1:
        masks[False] = _masks(batches, "decoder_attention_mask", opening, model.device)
    walk = BlockWalk(model, layout, batches)
    for block in walk.forward(until=max(wanted)):
        linears = wanted.get(block.index, [])
        in_first_stack = block.index < len(layout.stacks[0])
        own, source = masks[in_first_stack], masks[True]
        collector = MomentCollector(model, linears, request, TokenMasks(own, source))
        with walk.watching(collector.reads, collector.writes):
            block.pass_on()
        if linears:
            collector.add_up()
            yield block.index, collector.statistics()


def _masks(batches: Sequence[Batch], name: str, opening: int, device: "torch.device") -> list[Tensor | None]:
    masks = [batch.get(name) for batch in batches]
    return [None if mask is None else measured(mask, opening).to(device) for mask in masks]


class MomentCollector:
    """Sums moments of some linears' inputs or outputs, and magnitudes of inputs, of what `reads` and `writes` are told.

    Linears of one input group read the same tensor: its moments are summed once. For ``smaller`` a group's input
    is chosen when its Gram is cheaper than those of its linears' outputs together.
    """

    def __init__(
        self, model: PreTrainedModel, refs: Sequence[LinearRef], request: StatisticsRequest, masks: TokenMasks
    ) -> None:
        self._model, self._masks, device = model, masks, model.device
        kind = SampleMoments if request.scaled_samples else Moments
        self._groups: dict[str, list[LinearRef]] = defaultdict(list)
        for ref in refs:
            self._groups[ref.input_group].append(ref)
        self._inputs: dict[str, Moments] = {}
        self._outputs: dict[str, Moments] = {}
        self._magnitudes: dict[str, Magnitudes] = {}
        for name, group in self._groups.items():
            width = group[0].in_features
            if request.magnitudes:
                self._magnitudes[name] = Magnitudes(width, device)
            if request.moments == "input" or (
                request.moments == "smaller" and width**2 < sum(ref.out_features**2 for ref in group)
            ):
                self._inputs[name] = kind.zeros(width, device)
            elif request.moments is not None:
                for ref in group:
                    self._outputs[ref.name] = kind.zeros(ref.out_features, device)

    @property
    def reads(self) -> dict[str, Callable[[int, Tensor], None]]:
        """See `lowrank_kit.calibration.walk.Reads`."""
        return {
            group[0].name: self._reader(name, group[0])
            for name, group in self._groups.items()
            if name in self._inputs or name in self._magnitudes
        }

    @property
    def writes(self) -> dict[str, Callable[[int, Tensor, Tensor], None]]:
        """See `lowrank_kit.calibration.walk.Writes`."""
        refs = [ref for group in self._groups.values() for ref in group if ref.name in self._outputs]
        return {ref.name: self._writer(ref) for ref in refs}

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
        """What was collected, a record for every linear; it is held no longer."""
        found = []
        for name, group in self._groups.items():
            magnitude = self._magnitudes[name].mean() if name in self._magnitudes else None
            inputs = self._inputs.pop(name, None)
            for ref in group:
                if inputs is not None:
                    found.append(LayerStatistics(ref, "input", inputs, magnitude))
                else:
                    moments = self._outputs.pop(ref.name, None) or Moments.zeros(0)
                    found.append(LayerStatistics(ref, "output", moments, magnitude))
        return found

    def _reader(self, name: str, ref: LinearRef) -> Callable[[int, Tensor], None]:
        sums = [held[name] for held in (self._magnitudes, self._inputs) if name in held]

        def read(number: int, inputs: Tensor) -> None:
            for each in sums:
                self._update(ref, each, number, inputs)

        return read

    def _writer(self, ref: LinearRef) -> Callable[[int, Tensor, Tensor], None]:
        return lambda number, _, outputs: self._update(ref, self._outputs[ref.name], number, outputs)

    def _update(self, ref: LinearRef, sums: "Moments | Magnitudes", number: int, activations: Tensor) -> None:
        # Of the encoder's hidden states, the encoder's mask tells which tokens are real.
        mask = (self._masks.source if ref.of_source else self._masks.own)[number]
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
