"""Sequential correction: fit every matrix to its ORIGINAL outputs on the inputs that the compressed model gives it.

With X the inputs of a layer in the original model and X' those in the model compressed so far, the best dense weight
is `W* = W C_XX' C_X'X'^-1`, and the best low-rank one is the truncation of W* in the metric of C_X'X'. Both are
anchored by the error on the original inputs, or a few calibration windows would be fitted too closely.

What writes to the residual stream (o, down) may fit more than its own outputs: with h and h' the streams that these are
added to, `W x + (h - h')` instead of `W x`, so that it also makes up for the error that earlier layers left there.

Blocks are visited in order, and inside a block the groups of linears that share an input; both models' hidden states
and what the original block's linears read wait on the CPU, a block at a time.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Float64
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import load_gradients
from lowrank_kit.calibration.statistics import GradientStatistics, LayerStatistics
from lowrank_kit.calibration.stream import BlockCall, Magnitudes, record_calls
from lowrank_kit.corrections.base import Correction, Factorisation
from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.spectral.moments import ROWS_PER_PRODUCT, Moments
from lowrank_kit.truncations.base import Layer, Truncation

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


class Refit(Correction):
    """In order of execution, every matrix is refitted to its original outputs on the compressed model's inputs."""

    to_stream: ClassVar[bool] = False
    """Whether what writes to the residual stream makes up for what the stream lacks."""

    anchor: float = Field(default=1.0, ge=0)
    """Weight of the error on the original inputs against that on the compressed ones."""
    ridge: float = Field(default=0.001, gt=0)
    """Pull towards the original weight, as a share of the inputs' mean energy."""

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
        model.eval()
        batches = batches_of(model, samples, work.batch_size)
        modules = [model.get_submodule(path) for path in layout.blocks]
        recorded = [record_calls(model, modules, {k: v.to(model.device) for k, v in b.items()}) for b in batches]
        states = [_State(hidden[0], hidden[0].clone(), calls) for hidden, calls in recorded]
        del recorded
        has_experts = any(ref.expert is not None for ref in layout.linears)
        if writers and (has_experts or not states[0].adds(model, modules[0], writers[0])):
            roles = dict.fromkeys(ref.role for ref in layout.linears if ref.writes_residual)
            log.warning(
                "%s changes the outputs of %s before they reach the residual stream: corrected without it",
                layout.model_type, " and ".join(roles),
            )  # fmt: skip
            writers.clear()
        bar = work.progress.add_task("correct and factorise", total=len(modules)) if work.progress else None
        for index, module in enumerate(modules):
            groups = list(blocks[index].values())
            firsts = [group[0].name for group in groups]
            reads = [state.advance_original(model, module, firsts, writers[index], index) for state in states]
            gradients = decomposition.gradients if groups else None
            known = load_gradients(gradients, index, model.device) if gradients else {}
            for group in groups:
                first = group[0]
                sums = _Sums(first, first.name in writers[index], samples.opening, model.device)
                for state, original in zip(states, reads, strict=True):
                    sums.add(original.pop(first.name), state.read(model, module, first.name, writers[index], index))
                correction = sums.correction(self.anchor, self.ridge)
                for ref in group:
                    self._replace(work, ref, correction, known.get(ref.name))
            for state in states:
                state.compressed = _run(module, state.compressed, state.calls[index]).cpu()
            if work.progress and bar is not None:
                work.progress.advance(bar)

    def _replace(
        self, work: Factorisation, ref: LinearRef, correction: "_Correction", gradient: GradientStatistics | None
    ) -> None:
        module: Any = work.model.get_submodule(ref.name)
        corrected = weight_of(module).double() @ correction.inputs
        if correction.residual is not None:
            corrected = corrected + correction.residual
        rank = work.plan.ranks[ref.name]
        if rank == ref.full_rank:
            set_weight(module, corrected)
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
        replace_linear(work.model, ref.name, *projection.factors(corrected, rank))


@dataclass
class _Read:
    """What a linear reads, `[rows, tokens, in]`, and the residual stream that its outputs would be added to."""

    inputs: Tensor
    stream: Tensor


class _State:
    """One batch: the hidden states before the current block, in the original and in the compressed model."""

    def __init__(self, original: Tensor, compressed: Tensor, calls: Sequence[BlockCall]) -> None:
        self.original, self.compressed, self.calls = original, compressed, calls

    def adds(self, model: "nn.Module", block: "nn.Module", writers: Sequence[str]) -> bool:
        """Whether the first block's outcome is its input plus the outputs of these linears."""
        with _Recorder(model, (), writers) as recorder:
            after = _run(block, self.original, self.calls[0]).cpu()
        stream = _stream(self.original, recorder.written)
        return bool((after - stream).norm() < 0.01 * (after - self.original).norm())

    def advance_original(
        self, model: "nn.Module", block: "nn.Module", linears: Sequence[str], writers: Sequence[str], index: int
    ) -> dict[str, _Read]:
        """Pass the block, not yet replaced; what each of these linears reads, by name."""
        with _Recorder(model, linears, writers) as recorder:
            after = _run(block, self.original, self.calls[index]).cpu()
        found = {name: _Read(x, _stream(self.original, before)) for name, (x, before) in recorder.read.items()}
        self.original = after
        return found

    def read(self, model: "nn.Module", block: "nn.Module", linear: str, writers: Sequence[str], index: int) -> _Read:
        """What the linear reads in the compressed model; the block is run no further."""
        with _Recorder(model, [linear], writers, stop=True) as recorder, suppress(_InputReached):
            _run(block, self.compressed, self.calls[index])
        inputs, before = recorder.read[linear]
        return _Read(inputs, _stream(self.compressed, before))


class _InputReached(Exception):
    """Unwinds a block's forward pass: what follows the linear need not be computed."""


class _Recorder:
    """Notes, while entered, what some linears read and what the writers have written by then."""

    def __init__(self, model: "nn.Module", linears: Sequence[str], writers: Sequence[str], stop: bool = False) -> None:
        self._model, self._linears, self._writers, self._stop = model, linears, writers, stop
        self.written: list[Tensor] = []
        self.read: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def __enter__(self) -> "_Recorder":
        with ExitStack() as stack:
            for name in self._linears:
                module = self._model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(partial(self._note_input, name)).remove)
            for name in self._writers:
                module = self._model.get_submodule(name)
                stack.callback(module.register_forward_hook(self._note_output).remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _note_input(self, name: str, _module: "nn.Module", inputs: tuple[Tensor, ...]) -> None:
        self.read[name] = inputs[0].cpu(), list(self.written)
        if self._stop:
            raise _InputReached

    def _note_output(self, _module: "nn.Module", _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.written.append(output.cpu())


def _stream(hidden: Tensor, written: Sequence[Tensor]) -> Tensor:
    # OPT's linears see tokens of all rows in one list.
    return sum((output.view_as(hidden) for output in written), hidden)


def _run(block: "nn.Module", hidden: Tensor, call: BlockCall) -> Tensor:
    output = block(hidden.to(next(block.parameters()).device), *call.args, **call.kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@dataclass
class _Correction:
    """`W* = W inputs + residual`, and the moments and magnitudes that the truncation of W* is measured in."""

    inputs: Float64[Tensor, "in in"]
    residual: Float64[Tensor, "out in"] | None
    moments: Moments
    magnitudes: Float64[Tensor, " in"]


class _Sums:
    """Second moments of what a group of linears reads, in the original model and in the compressed one."""

    def __init__(self, ref: LinearRef, with_stream: bool, opening: int, device: "torch.device") -> None:
        self._opening = opening
        self._old, self._new = Moments.zeros(ref.in_features, device), Moments.zeros(ref.in_features, device)
        self._old_magnitudes, self._new_magnitudes = (Magnitudes(ref.in_features, device) for _ in range(2))
        self._difference = torch.zeros_like(self._new.gram)
        self._stream = torch.zeros(ref.out_features, ref.in_features).to(self._difference) if with_stream else None

    def add(self, old: _Read, new: _Read) -> None:
        """Add one batch: sums of `x x^T`, `x' x'^T`, `(x - x') x'^T` and `(h - h') x'^T`."""
        before, after = (self._rows(read.inputs.view(*read.stream.shape[:2], -1)) for read in (old, new))
        self._old.update(before)
        self._new.update(after)
        self._old_magnitudes.update(before)
        self._new_magnitudes.update(after)
        _add_product(self._difference, before - after, after)
        if self._stream is not None:
            _add_product(self._stream, self._rows(old.stream - new.stream), after)

    def correction(self, anchor: float, ridge: float) -> _Correction:
        """The minimiser W* of `|W X + (H - H') - W* X'|^2 + anchor |(W - W*) X|^2`, without H where no stream is kept.

        With `M = C_X'X' + anchor C_XX` it is `W + (W (C_XX' - C_X'X') + C_(H-H')X') (M + ridge I)^-1`; the ridge, in
        units of the mean diagonal, pulls it towards W.
        """
        gram = self._new.gram + anchor * self._old.gram
        damped = gram.clone()
        damped.diagonal().add_(ridge * float(gram.diagonal().mean()))
        root = torch.linalg.cholesky(damped)
        inputs = torch.cholesky_solve(self._difference.T, root).T
        inputs.diagonal().add_(1)
        residual = None if self._stream is None else torch.cholesky_solve(self._stream.T, root).T
        moments = Moments(gram / (1 + anchor), self._new.total, self._new.count)
        magnitudes = self._new_magnitudes.mean() + anchor * self._old_magnitudes.mean()
        return _Correction(inputs, residual, moments, magnitudes / (1 + anchor))

    def _rows(self, activations: Float[Tensor, "rows tokens _"]) -> Float[Tensor, "counted _"]:
        return activations[:, self._opening :].to(self._difference.device).flatten(0, -2).float()


def _add_product(
    total: Float64[Tensor, "m n"], left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]
) -> None:
    for a, b in zip(left.split(ROWS_PER_PRODUCT), right.split(ROWS_PER_PRODUCT), strict=True):
        total += a.T @ b
