"""Sequential correction: fit every matrix to its ORIGINAL outputs on the inputs that the compressed model gives it.

With X the inputs of a layer in the original model and X' those in the model compressed so far, the best dense weight
is `W* = W C_XX' C_X'X'^-1`, and the best low-rank one is the truncation of W* in the metric of C_X'X'. Both are
anchored by the error on the original inputs, or a few calibration windows would be fitted too closely.

What writes to the residual stream (o, down) may fit more than its own outputs: with h and h' the streams that these are
added to, `W x + (h - h')` instead of `W x`, so that it also makes up for the error that earlier layers left there.

Two walks go through the blocks together, of the original and of the compressed model, and inside a block the groups of
linears that share an input are visited in order. What the original block's linears read waits on the CPU.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

from jaxtyping import Float, Float64
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import collect_gradients, load_gradients
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.calibration.statistics import GradientStatistics, LayerStatistics
from lowrank_kit.calibration.walk import Block, BlockWalk
from lowrank_kit.corrections.correction import Correction, Factorisation
from lowrank_kit.corrections.finished import FinishedBlocks
from lowrank_kit.corrections.least_squares import Corrected, Read, Sums
from lowrank_kit.deferred import Tensor, no_grad
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.models.streamed import weights_of
from lowrank_kit.progress import Bar
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.truncations.truncation import Layer, Truncation

log = logging.getLogger(__name__)

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What ``ridge=null`` chooses from."""

CHECKED_SHARE = 1 / 8
"""Of the batches, those that a ridge is chosen by."""


class Refit(Correction):
    """In order of execution, every matrix is refitted to its original outputs on the compressed model's inputs."""

    anchor: float = Field(default=1.0, ge=0)
    """Weight of the error on the original inputs against that on the compressed ones."""
    ridge: float | None = Field(default=0.001, gt=0)
    """Pull towards the original weight, as a share of the inputs' mean energy. null: for every matrix, one of 0.001,
    0.01, 0.1, 1 and 10: whose fit to seven eighths of the calibration batches errs least on the last eighth."""

    @property
    def to_stream(self) -> bool:
        """Whether what writes to the residual stream makes up for what the stream lacks."""
        return False

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """Raise `ConfigError` for a truncation that joins blocks, and for experts, which may read other tokens."""
        experts = dict.fromkeys(ref.role for ref in refs if ref.expert is not None)
        if experts:
            others = dict.fromkeys(ref.role for ref in refs if ref.expert is None)
            raise ConfigError(
                f"method.correction={self.kind} compares what a matrix reads of the same tokens in two models, and "
                f"experts ({', '.join(experts)}) may get others: method.correction=none, or "
                f"method.roles=[{','.join(others)}]"
            )
        if truncation.span > 1:
            raise ConfigError(
                f"method.correction={self.kind} goes block by block: it needs a truncation of single blocks"
            )

    @no_grad
    def factorise(self, work: Factorisation) -> None:
        """Replace every planned matrix by the factors of its corrected weight, and dense ones by that weight."""
        model, samples, decomposition = work.model, work.samples, work.decomposition
        layout = layout_of(model)
        blocks: dict[int, dict[str, list[LinearRef]]] = defaultdict(lambda: defaultdict(list))
        for ref in decomposition.request.refs:
            blocks[ref.block][ref.input_group].append(ref)
        writers: dict[int, list[str]] = defaultdict(list)
        if self.to_stream:
            for ref in layout.linears:
                if ref.writes_residual:
                    writers[ref.block].append(ref.name)
        # What experts write is weighted before.
        has_experts = any(ref.expert is not None for ref in layout.linears)
        batches, request = batches_of(model, samples), decomposition.request
        if (store := decomposition.gradients) is not None:
            # They may have been pushed out of the cache since the decomposition was made of them.
            collect_gradients(
                model, layout, batches, request.refs, request.needs(), store, work.progress, samples.opening
            )
        original, compressed = (BlockWalk(model, layout, batches) for _ in range(2))
        bar = Bar(work.progress, "correct and factorise", len(layout.blocks))
        finished = FinishedBlocks(work.folder, self._digest(work), weights_of(model))
        for block in compressed.forward():
            index = block.index
            before = original.reach(index)
            if index == 0 and writers and (has_experts or not _adds(before, writers[0])):
                roles = dict.fromkeys(ref.role for ref in layout.linears if ref.writes_residual)
                log.warning(
                    "%s changes the outputs of %s before they reach the residual stream: corrected without it",
                    layout.model_type, " and ".join(roles),
                )  # fmt: skip
                writers.clear()
            is_finished = index in finished
            groups = [] if is_finished else list(blocks[index].values())
            with _noted(original, [group[0].name for group in groups], writers[index]) as reads:
                before.pass_on()
            gradients = decomposition.gradients if groups else None
            known = load_gradients(gradients, index, model.device) if gradients else {}
            for group in groups:
                first = group[0]
                parts = []
                for numbers in self._parts(self.fitted(compressed.numbers)):
                    sums = Sums(first, first.name in writers[index], samples.opening, model.device)
                    for number in numbers:
                        with _noted(compressed, [first.name], writers[index], stop=True) as found:
                            block.run(number)
                        sums.add(reads.pop((first.name, number)), found[first.name, number])
                    parts.append(sums)
                narrowed = work.narrowed.get(first.name) if first.writes_residual else None
                kept = None if narrowed is None else work.plan.kept[narrowed.name]
                weights = {ref.name: weight_of(model.get_submodule(ref.name)).double() for ref in group}
                ridges = self._ridges(parts, weights, kept)
                for part in parts[1:]:
                    parts[0].add_sums(part)
                corrections = {ridge: parts[0].correction(self.anchor, ridge, kept) for ridge in {*ridges.values()}}
                for ref in group:
                    self._replace(work, ref, corrections[ridges[ref.name]], known.get(ref.name))
            if is_finished:
                refs = [ref for group in blocks[index].values() for ref in group]
                work.outline(refs)
                finished.restore(index, block.module, model.device)
            elif groups:
                # What writes to the stream last has the gradients of what the block gives.
                last = next((known[name].gram for name in writers[index][-1:] if name in known), None)
                self.finish(block, Targets(original.states, samples.opening, last), finished)
                finished.keep(index, block.module)
            # The compressed walk passes on when it is asked for the next block, with this one as it is now.
            bar.advance()

    def fitted(self, numbers: Sequence[int]) -> Sequence[int]:
        """The batches, of all, that matrices are fitted to."""
        return numbers

    def _parts(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The batches that are summed together: where a ridge is to be chosen, those that it is chosen by apart."""
        if self.ridge is not None:
            return [numbers]
        checked = ceil(CHECKED_SHARE * len(numbers))
        if checked == len(numbers):
            raise ConfigError(
                "method.correction.ridge=null chooses by batches that are not fitted to, and there is only one: raise "
                "calibration.samples or lower calibration.batch_size, or give a ridge such as 0.001"
            )
        return [numbers[:-checked], numbers[-checked:]]

    def _ridges(
        self, parts: Sequence[Sums], weights: Mapping[str, Float64[Tensor, "out in"]], kept: Sequence[int] | None
    ) -> dict[str, float]:
        if self.ridge is not None:
            return dict.fromkeys(weights, self.ridge)
        fit, check = parts
        errors: dict[str, dict[float, float]] = defaultdict(dict)
        for ridge in RIDGES:
            correction = fit.correction(self.anchor, ridge, kept)
            for name, weight in weights.items():
                errors[name][ridge] = check.error(weight, correction.applied(weight), self.anchor, kept)
        ridges = {name: min(found, key=lambda ridge: found[ridge]) for name, found in errors.items()}
        log.debug("ridges: %s", ridges)
        return ridges

    def started(self, factors: LowRankFactors) -> LowRankFactors:
        """The form in which factors go into the model."""
        return factors

    def finish(self, block: Block, targets: "Targets", finished: FinishedBlocks) -> None:
        """Work on a block whose matrices are replaced.

        Args:
            block: reached by all batches of the compressed model, and not yet passed on.
            targets: what it should give.
            finished: keeps what is begun of the block.
        """

    def _digest(self, work: Factorisation) -> str:
        """What the blocks are made of."""
        settings = [self.model_dump(mode="json"), work.samples.fingerprint(), work.samples.batch_size]
        return hashlib.sha256(json.dumps([work.made_of, settings]).encode()).hexdigest()

    def _replace(
        self, work: Factorisation, ref: LinearRef, correction: Corrected, gradient: GradientStatistics | None
    ) -> None:
        module: Any = work.model.get_submodule(ref.name)
        corrected = correction.applied(weight_of(module).double())
        rank = work.plan.ranks[ref.name]
        if (narrowed := work.narrowed.get(ref.name)) is not None and ref.writes_residual:
            work.narrow(narrowed, corrected)
            return
        # What a channel is made of is corrected while all of them are there.
        if rank == ref.full_rank or narrowed is not None:
            set_weight(module, corrected)
            work.round(ref.name)
            return
        if gradient is not None and gradient.gram is not None and ref.out_features > ref.in_features:
            # The metric as the inputs see it, W^T B W, moves with the weight (by its first part: B is not at hand).
            moved = correction.inputs.T @ gradient.gram.double() @ correction.inputs
            gradient = replace(gradient, gram=moved)
        statistics = LayerStatistics(ref, "input", correction.moments, correction.magnitudes, gradient)
        try:
            projection = work.decomposition.request.truncation.project([Layer(corrected, None, statistics)])
        except ValueError as error:
            raise LowRankKitError(f"{ref.name} cannot be decomposed: {error}") from error
        factors = self.started(projection.factors(corrected, rank))
        work.put([ref.name], factors)


@dataclass(frozen=True)
class Targets:
    """What the original block gives in the original model.

    Attributes:
        states: by batch, `[rows, tokens, hidden]`.
        opening: tokens at the beginning of every row at which nothing is measured.
        metric: B of what the block gives, `[hidden, hidden]`; None where gradients are not known.
    """

    states: Hidden
    opening: int
    metric: Float[Tensor, "hidden hidden"] | None


def _adds(block: Block, writers: Sequence[str]) -> bool:
    """Whether the block's outcome for the first batch is its input plus the outputs of these linears."""
    hidden = block.walk.states[0].cpu()
    written: list[Tensor] = []
    with block.walk.watching(writes={name: lambda _number, _read, output: written.append(output) for name in writers}):
        after = block.run(0).cpu()
    return bool((after - _stream(hidden, written)).norm() < 0.01 * (after - hidden).norm())


class _InputReached(Exception):
    """Unwinds a block's forward pass: what follows the linear need not be computed."""


@contextmanager
def _noted(
    walk: BlockWalk, linears: Sequence[str], writers: Sequence[str], stop: bool = False
) -> Iterator[dict[tuple[str, int], Read]]:
    """What these linears read, by name and batch; with ``stop``, a block is left where the first of them is reached."""
    found: dict[tuple[str, int], Read] = {}
    written: dict[int, list[Tensor]] = defaultdict(list)

    def note(name: str, number: int, inputs: Tensor) -> None:
        # The batch is not yet behind the block: its state is the one before it.
        found[name, number] = Read(inputs.cpu(), _stream(walk.states[number].cpu(), written[number]))
        if stop:
            raise _InputReached

    reads = {name: partial(note, name) for name in linears}
    writes = dict.fromkeys(writers, lambda number, _, output: written[number].append(output))
    with walk.watching(reads, writes), suppress(_InputReached):
        yield found


def _stream(hidden: Tensor, written: Sequence[Tensor]) -> Tensor:
    # A copy: the state is overwritten when its batch is behind the block.
    stream = hidden.clone()
    for output in written:
        # OPT's linears see tokens of all rows in one list.
        stream += output.cpu().view_as(hidden)
    return stream
