"""Gradient statistics of a causal model's linears: one backward pass over the calibration set, in bounded memory.

Blocks are visited from the last to the first, as many at a time as fit `STATISTICS_BYTES`; the blocks below those
build no graph, and activations inside the others are recomputed in the backward pass.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit import distributed
from lowrank_kit.calibration.backward import Batch, frozen, next_token_loss, recomputed
from lowrank_kit.calibration.statistics import GradientStatistics
from lowrank_kit.calibration.texts import measured
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.linear import check_linear, is_transposed
from lowrank_kit.spectral.moments import Moments

STATISTICS_BYTES = 4 * 2**30
"""Statistics held at once; a model whose blocks need more takes several passes."""


def stream_gradients(
    model: PreTrainedModel,
    layout: ModelLayout,
    batches: Sequence[Batch],
    refs: Collection[LinearRef],
    with_mean: bool,
    skip: Collection[int] = (),
    progress: Progress | None = None,
    opening: int = 0,
) -> Iterator[tuple[int, dict[str, GradientStatistics]]]:
    """Yield `(block index, gradient statistics of its linears by name)` from the last block to the first.

    Args:
        model: a causal language model, in evaluation mode while the generator runs; left as it was found.
        layout: its layout.
        batches: `[rows, tokens]` model inputs with attention masks; padded positions are not counted. Of several
            processes each reads its `distributed.share`, and all get the statistics of all batches.
        refs: the linears wanted.
        with_mean: also the gradient in the weight itself.
        skip: block indices whose statistics are known already.
        progress: shows one bar over all batches.
        opening: tokens at the beginning of every row that are read and not counted (BOS); ``mean``, the gradient of
            the loss, is of what they contribute to it, too.

    Raises:
        LowRankKitError: a model without next-token head, or gradients that are not finite.
    """
    wanted: dict[int, list[LinearRef]] = {}
    for ref in sorted(refs, key=lambda ref: -ref.block):
        if ref.block not in skip:
            wanted.setdefault(ref.block, []).append(ref)
    passes, batches = list(_passes(wanted, with_mean)), distributed.share(batches)
    task = progress.add_task("gradients", total=len(passes) * len(batches)) if progress else None
    with frozen(model):
        for blocks in passes:
            linears = [ref for block in blocks for ref in wanted[block]]
            collector = _Collector(model, linears, with_mean, opening)
            with ExitStack() as stack:
                stack.enter_context(collector)
                stack.enter_context(recomputed(model, layout.blocks[min(blocks) :]))
                lowest = model.get_submodule(layout.blocks[min(blocks)])
                stack.callback(lowest.register_forward_pre_hook(_start_graph, prepend=True).remove)
                for batch in batches:
                    collector.read(model, {k: v.to(model.device) for k, v in batch.items()})
                    if progress and task is not None:
                        progress.advance(task)
            collector.add_up()
            statistics = collector.statistics()
            for block in blocks:
                yield block, {ref.name: statistics.pop(ref.name) for ref in wanted[block]}


def _passes(wanted: Mapping[int, Sequence[LinearRef]], with_mean: bool) -> Iterator[list[int]]:
    """Group the blocks so that no group's statistics exceed the limit; a block alone may."""
    group: list[int] = []
    held = 0
    for block, refs in wanted.items():
        size = sum(8 * r.full_rank**2 + 4 * with_mean * r.in_features * r.out_features for r in refs)
        if group and held + size > STATISTICS_BYTES:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


class _Collector:
    """Hooks on the linears of one pass."""

    def __init__(self, model: nn.Module, refs: Sequence[LinearRef], with_mean: bool, opening: int) -> None:
        self._linears = {ref: check_linear(model.get_submodule(ref.name), ref.name) for ref in refs}
        device = next(model.parameters()).device
        self._grams = {ref: Moments.zeros(ref.full_rank, device) for ref in refs}
        self._rows = {ref: torch.zeros(ref.out_features, dtype=torch.float64, device=device) for ref in refs}
        self._energy = dict.fromkeys(refs, 0.0)
        self._input_energy: dict[LinearRef, Tensor] = {}
        self._mask: Tensor | None = None
        self._tokens = 0
        self._with_mean, self._opening = with_mean, opening

    def __enter__(self) -> "_Collector":
        self._handles: list[Any] = []
        for ref, module in self._linears.items():
            module.weight.requires_grad_(self._with_mean)
            self._handles.append(module.register_forward_pre_hook(self._note_input(ref)))
            self._handles.append(module.register_full_backward_hook(self._note_gradient(ref)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._linears.values():
            module.weight.requires_grad_(False)

    def read(self, model: PreTrainedModel, batch: Batch) -> None:
        """Add one batch."""
        self._mask = measured(batch["attention_mask"], self._opening)
        self._tokens += int(self._mask.sum())
        with torch.enable_grad():
            next_token_loss(model, batch).backward()  # type: ignore[no-untyped-call]

    def add_up(self) -> None:
        """Take in what the other processes collected from their batches."""
        if distributed.size() == 1:
            return
        self._tokens = int(distributed.total(self._tokens))
        for ref, module in self._linears.items():
            distributed.add_up(self._grams[ref].gram, self._rows[ref])
            self._energy[ref] = distributed.total(self._energy[ref])
            if self._with_mean:
                if module.weight.grad is None:
                    # There are more processes than batches.
                    module.weight.grad = torch.zeros_like(module.weight)
                distributed.add_up(module.weight.grad)

    def statistics(self) -> dict[str, GradientStatistics]:
        """What was collected; the weights' own gradients are taken from them."""
        found = {}
        for ref, module in self._linears.items():
            mean = None
            if (summed := module.weight.grad) is not None:
                mean = (summed.T if is_transposed(module) else summed) / self._tokens
                module.weight.grad = None
            gram = self._grams.pop(ref).gram
            found[ref.name] = GradientStatistics(self._tokens, gram, self._energy[ref], self._rows.pop(ref), mean)
        return found

    def _note_input(self, ref: LinearRef) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._input_energy[ref] = inputs[0].detach().float().pow(2).sum(-1)

        return hook

    def _note_gradient(self, ref: LinearRef) -> Callable[..., None]:
        def hook(_module: nn.Module, towards_input: tuple[Tensor, ...], at_output: tuple[Tensor, ...]) -> None:
            gradient = at_output[0].float()
            squares = gradient.pow(2)
            if self._mask is not None:
                squares = squares * self._mask.reshape(*squares.shape[:-1], 1)
            self._energy[ref] += float(squares.sum(dtype=torch.float64))
            self._rows[ref] += (squares * self._input_energy[ref][..., None]).flatten(0, -2).sum(0, dtype=torch.float64)
            seen = gradient if ref.out_features <= ref.in_features else towards_input[0]
            try:
                self._grams[ref].update(seen, None if self._mask is None else self._mask.reshape(seen.shape[:-1]))
            except ValueError as error:
                raise LowRankKitError(f"gradients of {ref.name}: {error}") from error

        return hook


def _start_graph(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = args[0].detach().requires_grad_()
    return (hidden, *args[1:])
