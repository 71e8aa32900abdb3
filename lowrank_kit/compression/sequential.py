"""Sequential correction: fit every matrix to its ORIGINAL outputs on the inputs that the compressed model gives it.

With X the inputs of a layer in the original model and X' those in the model compressed so far, the best dense weight
is `W* = W C_XX' C_X'X'^-1`, and the best low-rank one is the truncation of W* in the metric of C_X'X'. Both are
anchored by the error on the original inputs, or a few calibration windows would be fitted too closely. Blocks are
visited in order, and inside a block the groups of linears that share an input; both models' hidden states and what the
original block's linears read wait on the CPU, a block at a time.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.calibration.collect import load_gradients
from lowrank_kit.calibration.statistics import GradientStatistics, LayerStatistics
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.stream import BlockCall, record_calls
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.svd import TruncatedSVD
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.spectral.moments import ROWS_PER_PRODUCT, Moments
from lowrank_kit.truncation.base import Layer


@torch.no_grad()
def factorise_sequentially(
    model: PreTrainedModel,
    method: TruncatedSVD,
    plan: Plan,
    samples: CalibrationSamples,
    *,
    batch_size: int,
    gradients: CalibrationStore | None,
    progress: Progress | None = None,
) -> None:
    """Replace every planned matrix by the factors of its corrected weight, and dense ones by that weight, in place.

    Args:
        model: the original model, a decoder.
        method: which truncation, and how strongly the correction is held back (`anchor`, `ridge`).
        plan: the ranks.
        samples: calibration windows of equal length.
        batch_size: windows a batch.
        gradients: gradient statistics of the original model, where the truncation reads them.
        progress: shows one bar over the blocks.
    """
    layout = layout_of(model)
    blocks: dict[int, dict[str, list[LinearRef]]] = defaultdict(lambda: defaultdict(list))
    for ref in method.targets(layout):
        blocks[ref.block][ref.input_group].append(ref)
    model.eval()
    batches = samples.batches(batch_size, model.config.get_text_config().pad_token_id or 0)
    modules = [model.get_submodule(path) for path in layout.blocks]
    recorded = [record_calls(model, modules, {k: v.to(model.device) for k, v in b.items()}) for b in batches]
    states = [_State(hidden[0], hidden[0].clone(), calls) for hidden, calls in recorded]
    del recorded
    bar = progress.add_task("correct and factorise", total=len(modules)) if progress else None
    for index, module in enumerate(modules):
        firsts = [group[0].name for group in blocks[index].values()]
        read = [state.advance_original(model, module, firsts, index) for state in states]
        known = load_gradients(gradients, index, model.device) if gradients and index in blocks else {}
        for group in blocks[index].values():
            sums = _Sums(group[0].in_features, model.device)
            for state, inputs in zip(states, read, strict=True):
                sums.add(inputs[group[0].name], state.input_of(model, module, group[0].name, index))
            correction, moments = sums.correction(method)
            for ref in group:
                _replace(model, method, ref, plan.ranks[ref.name], correction, moments, known.get(ref.name))
        for state in states:
            state.compressed = _run(module, state.compressed, state.calls[index]).cpu()
        if progress and bar is not None:
            progress.advance(bar)


class _State:
    """One batch: the hidden states before the current block, in the original and in the compressed model."""

    def __init__(self, original: Tensor, compressed: Tensor, calls: Sequence[BlockCall]) -> None:
        self.original, self.compressed, self.calls = original, compressed, calls

    def advance_original(
        self, model: nn.Module, block: nn.Module, linears: Sequence[str], index: int
    ) -> dict[str, Tensor]:
        """Pass the block, not yet replaced; what each of these linears reads, by name."""
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in linears:
                hook = partial(_note, read, name)
                stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
            self.original = _run(block, self.original, self.calls[index]).cpu()
        return read

    def input_of(self, model: nn.Module, block: nn.Module, linear: str, index: int) -> Tensor:
        """What the linear reads in the compressed model; the block is run no further."""
        read: dict[str, Tensor] = {}
        handle = model.get_submodule(linear).register_forward_pre_hook(partial(_note, read, linear, stop=True))
        with suppress(_InputReached):
            _run(block, self.compressed, self.calls[index])
        handle.remove()
        return read[linear]


class _InputReached(Exception):
    """Unwinds a block's forward pass: what follows the linear need not be computed."""


def _note(
    read: dict[str, Tensor], name: str, _module: nn.Module, inputs: tuple[Tensor, ...], stop: bool = False
) -> None:
    read[name] = inputs[0].cpu()
    if stop:
        raise _InputReached


def _run(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    output = block(hidden.to(next(block.parameters()).device), *call.args, **call.kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class _Sums:
    """Second moments of what a group of linears reads, in the original model and in the compressed one."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._old, self._new = Moments.zeros(width, device), Moments.zeros(width, device)
        self._difference = torch.zeros_like(self._new.gram)

    def add(self, old: Tensor, new: Tensor) -> None:
        """Add one batch: sums of `x x^T`, `x' x'^T` and `(x - x') x'^T`."""
        old, new = (rows.to(self._new.gram.device).flatten(0, -2).float() for rows in (old, new))
        self._old.update(old)
        self._new.update(new)
        for a, b in zip(old.split(ROWS_PER_PRODUCT), new.split(ROWS_PER_PRODUCT), strict=True):
            self._difference += (a - b).T @ b

    def correction(self, method: TruncatedSVD) -> tuple[Float64[Tensor, "in in"], Moments]:
        """The map T with `W* = W T`, and the moments M that the truncation of W* is measured in.

        W* minimises `|W X - W* X'|^2 + anchor |(W - W*) X|^2`, so that `M = C_X'X' + anchor C_XX` and
        `T = I + (C_XX' - C_X'X') (M + ridge I)^-1`; the ridge, in units of the mean diagonal, pulls W* towards W.
        """
        gram = self._new.gram + method.anchor * self._old.gram
        damped = gram.clone()
        damped.diagonal().add_(method.ridge * float(gram.diagonal().mean()))
        solved: Tensor = torch.cholesky_solve(self._difference.T, torch.linalg.cholesky(damped)).T
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return identity + solved, Moments(gram / (1 + method.anchor), self._new.total, self._new.count)


def _replace(
    model: PreTrainedModel,
    method: TruncatedSVD,
    ref: LinearRef,
    rank: int,
    correction: Tensor,
    inputs: Moments,
    gradient: GradientStatistics | None,
) -> None:
    module: Any = model.get_submodule(ref.name)
    corrected = weight_of(module).double() @ correction
    if rank == ref.full_rank:
        set_weight(module, corrected)
        return
    if gradient is not None and ref.out_features > ref.in_features:
        # The metric as the inputs see it, W^T B W, moves with the weight.
        gradient = GradientStatistics(
            gradient.tokens, correction.T @ gradient.gram.double() @ correction, gradient.energy, gradient.rows
        )
    statistics = LayerStatistics(ref, "input", inputs, gradient=gradient)
    try:
        projection = method.truncation.project([Layer(corrected, None, statistics)])
    except ValueError as error:
        raise LowRankKitError(f"{ref.name} cannot be decomposed: {error}") from error
    replace_linear(model, ref.name, *projection.factors(corrected, rank))
