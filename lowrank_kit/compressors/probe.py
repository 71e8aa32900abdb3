"""The end-to-end loss of a model with some of its matrices truncated, measured on held-out calibration text."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int64
from rich.progress import Progress

from lowrank_kit.cache.entry import open_entry
from lowrank_kit.cache.figures import append_checked_line, content_hash, read_checked_lines
from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.deferred import PreTrainedModel, Tensor, no_grad, torch
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.head import Head
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.progress import Bar
from lowrank_kit.truncations.decompose import Decomposition


class LossProbe:
    """Measures truncations one after another (`lowrank_kit.allocations.allocation.Probe`); the model ends as it was.

    A forward pass starts at the first truncated block, from the hidden states that the original model has there. What
    was measured is kept in the cache: another ratio or rule that asks the same is answered from there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decomposition: Decomposition,
        windows: Int64[Tensor, "windows tokens"],
        progress: Progress | None = None,
    ) -> None:
        """Measure the dense loss on `windows` and keep their hidden states before every block, as `Hidden` says."""
        self._model, self._decomposition, self._windows = model, decomposition, windows
        self._bar = Bar(progress, "probe")
        layout = layout_of(model)
        self._walk = BlockWalk(model, layout, [{"input_ids": window[None]} for window in windows])
        self._walk.keep(range(1, len(layout.blocks) + 1))
        self._dense = self._loss(len(layout.blocks))
        key = StatisticsKey.of(
            model,
            layout,
            reads="loss",
            text=content_hash(windows),
            batch_size=1,
            request={"quantity": "probe", "decomposition": decomposition.store.key.digest},
        )
        self._file = open_entry(decomposition.store.root, key.digest, key.description) / "losses.jsonl"
        self._known = dict(read_checked_lines(self._file))

    def loss_change(self, ranks: Mapping[str, int]) -> float:
        """Mean token loss (nats) with these candidates cut to these ranks, minus that of the dense model."""
        return self._remembered(ranks, "", lambda first: self._loss(first) - self._dense)

    def divergence(self, ranks: Mapping[str, int]) -> float:
        """Mean over tokens of KL(dense || cut), with these candidates cut to these ranks (nats)."""
        return self._remembered(ranks, "divergence ", self._divergence)

    def _remembered(self, ranks: Mapping[str, int], quantity: str, measure: Callable[[int], float]) -> float:
        self._bar.advance()
        key = quantity + json.dumps(ranks, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._measured(ranks, measure)
            append_checked_line(self._file, [key, self._known[key]])
        return self._known[key]

    def _measured(self, ranks: Mapping[str, int], measure: Callable[[int], float]) -> float:
        """What ``measure`` finds of the model with these cuts, told the first block that is changed."""
        # At full rank a matrix is left dense: as it is, not as a product of rounded factors.
        groups = self._decomposition.groups
        dense = {group[0].name: min(len(group) * group[0].out_features, group[0].in_features) for group in groups}
        cut = {name for name, rank in ranks.items() if rank < dense.get(name, 0)}
        changed = [group for group in groups if group[0].name in cut]
        narrowed = [
            units for units in self._decomposition.request.units if ranks.get(units.name, units.count) < units.count
        ]
        if not changed and not narrowed:
            return 0.0
        with ExitStack() as stack:
            for units in narrowed:
                [down] = units.columns
                module: Any = self._model.get_submodule(down.name)
                weight = weight_of(module).detach().clone()
                stack.callback(set_weight, module, weight)
                kept = self._decomposition.eliminations[units.name].kept(ranks[units.name])
                # A channel that nothing reads is as good as gone.
                silenced = torch.zeros_like(weight)
                silenced[:, kept] = self._decomposition.narrowed(units, weight, kept).to(weight.dtype)
                set_weight(module, silenced)
            for group in changed:
                projection = self._decomposition.projection(group[0].name)
                for ref in group:
                    module = self._model.get_submodule(ref.name)
                    factors = projection.factors(weight_of(module), ranks[group[0].name])
                    stack.callback(set_weight, module, weight_of(module).detach().clone())
                    set_weight(module, factors.dense())
            blocks = [*(group[0].block for group in changed), *(units.block for units in narrowed)]
            return measure(min(blocks))

    @cached_property
    def _last_states(self) -> list[Tensor]:
        """What the head of the dense model reads, by window."""
        return [self._head_reads(number, len(layout_of(self._model).blocks)) for number in range(len(self._windows))]

    def _head_reads(self, number: int, first: int) -> Float[Tensor, "tokens hidden"]:
        with self._walk.begun(number, first):
            return Head(self._model).hidden(input_ids=self._windows[number][None].to(self._model.device))[0]

    @no_grad
    def _divergence(self, first: int) -> float:
        """Mean divergence over the windows, the blocks before `first` taken as known."""
        head, sums = Head(self._model), []
        for number, dense in enumerate(self._last_states):
            cut, size = self._head_reads(number, first), head.positions_at_once()
            for before, after in zip(dense.split(size), cut.split(size), strict=True):
                p, q = (head.logits(states).float().log_softmax(-1) for states in (before, after))
                sums.append(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")))
        return sum(sums) / self._windows.numel()

    def _loss(self, first: int) -> float:
        """Mean loss over the windows, the blocks before `first` taken as known."""
        losses = []
        for number, window in enumerate(self._windows):
            with self._walk.begun(number, first):
                losses.append(perplexity(self._model, window[None], device=self._model.device).nll)
        return sum(losses) / len(losses)
