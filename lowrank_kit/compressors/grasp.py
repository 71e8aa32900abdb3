"""GRASP: in redundant blocks, keep the singular components on which the loss depends (arXiv 2501.00339)."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxtyping import Float, Float64
from pydantic import Field, model_validator

from lowrank_kit.allocations.allocation import Budget, Candidate
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.modes import frozen
from lowrank_kit.plan import Plan
from lowrank_kit.plots.block_scores import influence_table, plot_influence
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.progress import Bar
from lowrank_kit.spectral.attribution import drop_change
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.truncations.decompose import Decomposition, Request, decompose
from lowrank_kit.truncations.plain import Plain
from lowrank_kit.truncations.truncation import Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Statistics:
    """What GRASP chooses from.

    ``influence``: that of every block of the original model, or of every run of blocks by its first; empty where the
    blocks are given. ``changes``: the loss's first-order change when a component is dropped, of the redundant blocks
    and by block; None where the components are scored in the order of the compression, or by magnitude.
    """

    decomposition: Decomposition
    influence: list[float]
    changes: CalibrationStore | None


class Grasp(Compressor):
    """Redundant blocks by block influence, and in their matrices ``W = sum_k sigma_k u_k v_k^T`` components by effect.

    The component's score is the first-order change of the calibration loss when it is dropped,
    ``|sigma_k dL/dsigma_k|`` with ``dL/dsigma_k = u_k^T G v_k`` and G = dL/dW over the whole calibration set (the
    paper's score is three times that). Biases stay. Of another ``truncation`` than the plain one, u_k, sigma_k and
    v_k are those of its metric (ours): for ``optimal``, sigma_k u_k is what the component adds to the outputs.

    There are n redundant blocks, the smallest number that meets the ratio if each loses ``removed_share``. How many
    components are kept there is the ``selection``:

    - ``ratio``: so many that ``ratio`` is met exactly, the same share in every matrix: never more parameters than the
      budget, and fewer by less than one component of the narrowest matrix;
    - ``removed``: what is left of a matrix after ``removed_share``, ``floor(out in (1 - c) / (out + in))``, as
      published; no less is removed than ``ratio``, with `blocks` unset;
    - ``share``: of every matrix the smallest set whose scores sum to `share` of the total; a set that saves no
      parameters leaves its matrix dense. ``ratio`` then only says how many blocks, and is reported against.
    """

    factorises: ClassVar[bool] = True

    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """The redundant blocks, counted from 0; null: found by block influence."""
    choice: Literal["free", "contiguous"] = "free"
    """`free`: the blocks of least influence; `contiguous`: the run of neighbours of least influence as a whole."""
    selection: Literal["ratio", "removed", "share"] = "ratio"
    """How many components are kept: to meet `ratio`, by `removed_share` of every matrix, or by `share` of its score."""
    removed_share: float = Field(default=0.9, gt=0, lt=1)
    """Share of a redundant block's parameters to remove; with `selection=ratio` its upper limit."""
    share: float | None = Field(default=None, gt=0, le=1)
    """For `selection=share`: the share of a matrix's total score that its kept components reach."""
    metric: Literal["taylor", "gradient", "magnitude"] = "taylor"
    """Score of a component: |sigma dL/dsigma|, |dL/dsigma|, or sigma (needs no gradient)."""
    # Left out where it is as published, so that older run directories are found again.
    truncation: Truncation = Field(default=Plain(), exclude_if=lambda truncation: truncation.kind == "plain")
    """What the components of a matrix are: its singular ones (`plain`, as published), or those of the metric of
    another truncation, measured on the original model."""
    propagate: bool = False
    """As published: block by block from the last, MLP before attention, each scored with those before it compressed.
    Otherwise one backward pass scores all."""
    iterative: bool = False
    """With `propagate`: block influence is measured again before every block, which then is the one of least."""
    label_shift: Literal["correct", "legacy"] = "correct"
    """`legacy` scores by the loss of the token after the next one, as the released code does; for parity only."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> "Grasp":
        if self.blocks is not None and len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks={list(self.blocks)} names a block twice")
        if (self.selection == "share") != (self.share is not None):
            raise ValueError("selection=share and a number for share go together: set both, or leave share null")
        if self.iterative and not self.propagate:
            raise ValueError("iterative=true measures a model that is compressed block by block: set propagate=true")
        if self.iterative and (self.blocks is not None or self.choice == "contiguous"):
            raise ValueError("iterative=true chooses block after block: leave blocks null and choice=free")
        return self

    @property
    def reads_gradients(self) -> bool:
        """Scores are gradients, unless magnitudes are asked for."""
        return self.metric != "magnitude"

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for blocks, or a ratio, that this layout cannot have. Reads shapes, no weights."""
        layout.select()
        if self.truncation.span > 1:
            raise ConfigError(
                f"method.truncation={self.truncation.kind} joins neighbouring blocks, and redundant ones need not be "
                "neighbours: choose a truncation of single blocks, for example truncation=optimal"
            )
        total = len(layout.blocks)
        if outside := [block for block in self.blocks or () if block >= total]:
            raise ConfigError(f"method.blocks: there is no block {outside[0]}; this model has 0 to {total - 1}")
        if (count := self.count(layout)) >= total:
            if self.blocks is not None:
                raise ConfigError(f"method.blocks names all {total} blocks as redundant: leave at least one out")
            most = math.floor(1e4 * self.removed_share * (total - 1) / total) / 1e4
            raise ConfigError(
                f"method.ratio={self.ratio:g} makes all {total} blocks redundant at method.removed_share="
                f"{self.removed_share:g}: lower method.ratio to {most:g} at most, or raise method.removed_share"
            )
        self.ranks(layout, self.blocks or range(count))

    def count(self, layout: ModelLayout) -> int:
        """How many blocks are redundant."""
        if self.blocks is not None:
            return len(self.blocks)
        return math.ceil(self.ratio * len(layout.blocks) / self.removed_share - 1e-9)

    @property
    def ahead(self) -> int:
        """Which token the loss is about: 1 is the next."""
        return 1 if self.label_shift == "correct" else 2

    def redundant(self, influence: Sequence[float], count: int, already: Collection[int] = ()) -> list[int]:
        """The ``count`` redundant blocks, of which some are known ``already`` and come first.

        ``influence`` is that of every block, the least first; for a contiguous choice that of every run of ``count``
        neighbours, by its first block.
        """
        ascending = sorted(range(len(influence)), key=lambda block: influence[block])
        if self.choice == "contiguous":
            return list(range(ascending[0], ascending[0] + count))
        return [*already, *(block for block in ascending if block not in already)][:count]

    def ranks(self, layout: ModelLayout, blocks: Collection[int]) -> dict[str, int | None]:
        """How many components every matrix of these blocks keeps, by name; None: its scores decide.

        Raises `ConfigError` where a matrix would keep none.
        """
        refs = [ref for block in blocks for ref in layout.linears if ref.block == block]
        if self.selection == "share":
            return {ref.name: None for ref in refs}
        if self.selection == "removed":
            return dict(self._published_ranks(refs))
        elsewhere = sum(ref.parameters for ref in layout.linears if ref.block not in blocks)
        budget = Budget(self.budget(layout) - elsewhere, elsewhere=elsewhere)
        return dict(Uniform().ranks([_candidate(ref) for ref in refs], budget))

    def score(self, sigma: Float64[Tensor, " r"], change: Float64[Tensor, " r"] | None) -> Float64[Tensor, " r"]:
        """Score of every component from its singular value and the loss's first-order change when it is dropped."""
        if change is None:
            return sigma
        return change.abs() if self.metric == "taylor" else torch.where(sigma > 0, (change / sigma).abs(), 0.0)

    def keep(self, ref: LinearRef, score: Float64[Tensor, " r"], rank: int | None) -> list[int] | None:
        """The components of highest score, in ascending order; None where they would save no parameters."""
        descending = score.argsort(descending=True, stable=True)
        if rank is None:
            assert self.share is not None
            running = score[descending].cumsum(0)
            rank = min(int((running < self.share * running[-1]).sum()) + 1, len(score))
        return sorted(descending[:rank].tolist()) if rank <= _candidate(ref).break_even else None

    def calibrate(self, context: Context) -> Statistics:
        """Measure block influence, decompose, and score the redundant blocks, unless `plan` does in its own order.

        The scores of a single pass are cached by block, for every ratio and both gradient metrics.
        """
        influence = self._influence(context)
        redundant = self._redundant(context.layout, influence)
        decomposition = decompose(
            context.model,
            Request(self.truncation, frozenset(), context.layout.select()),
            context.samples,
            cache=context.cache,
            # Every block may be chosen where influence is measured again in every turn.
            blocks=range(len(context.layout.blocks)) if self.iterative else redundant,
            progress=context.progress,
        )
        scored = self._in_one_pass and self.metric != "magnitude"
        return Statistics(
            decomposition, influence, self._changes(decomposition, redundant, context) if scored else None
        )

    def plan(self, statistics: Statistics, context: Context) -> Plan:
        """Choose blocks and components."""
        choose = self._kept_of_one_pass if self._in_one_pass else self._kept_in_turn
        plan = self.decide(context.layout, choose(statistics, context), statistics.influence)
        if context.progress and plan.scores:
            context.progress.console.print(influence_table(*_outcome(plan, context.layout), chosen="redundant"))
        return plan

    def apply(self, plan: Plan, statistics: Statistics, context: Context) -> "PreTrainedModel":
        """Replace every matrix of which components were chosen by these, in place."""
        bar = Bar(context.progress, "factorise", len(plan.kept))
        for name, kept in plan.kept.items():
            _replace(context, statistics.decomposition, name, kept)
            bar.advance()
        return context.model

    def plot(self, plan: Plan, statistics: Statistics, context: Context, folder: Path) -> None:
        """Influence of the blocks, and ranks."""
        linears = context.layout.linears
        if plan.scores:
            plot_influence(*_outcome(plan, context.layout), folder / "influence.png", chosen="redundant")
        plot_rank_map(linears, plan.ranks, Factors(), folder / "rank_map.png")
        plot_kept_ranks(linears, plan.ranks, folder / "kept_ranks.png")

    def decide(self, layout: ModelLayout, kept: Mapping[str, list[int]], influence: Sequence[float]) -> Plan:
        """The plan that keeps these components; ``influence`` as in `redundant`, empty where it was not measured."""
        ranks = {ref.name: len(kept[ref.name]) if ref.name in kept else ref.full_rank for ref in layout.linears}
        before = layout.parameters
        after = sum(_candidate(ref).cost(ranks[ref.name]) for ref in layout.linears)
        scores = dict(zip(layout.blocks, influence, strict=False))
        return Plan(self.name, ranks, tuple(range(len(layout.blocks))), before, after, scores, dict(kept))

    def _published_ranks(self, refs: Sequence[LinearRef]) -> dict[str, int]:
        break_even = {ref: _candidate(ref).rank_at(ref.parameters) for ref in refs}
        # A share of 0.9 leaves a hair less than a tenth in binary.
        ranks = {ref.name: math.floor(even * (1 - self.removed_share) + 1e-9) for ref, even in break_even.items()}
        smallest = min(refs, key=lambda ref: break_even[ref])
        if ranks[smallest.name] < 1:
            raise ConfigError(
                f"method.removed_share={self.removed_share:g} leaves no component of {smallest.name}, a "
                f"{smallest.out_features}x{smallest.in_features} matrix: lower it to "
                f"{math.floor(1e4 * (1 - 1 / break_even[smallest])) / 1e4:g} at most"
            )
        return ranks

    @property
    def _in_one_pass(self) -> bool:
        """Singular values do not change when other blocks do: by magnitude, the order matters only to iteration."""
        return not self.propagate or (self.metric == "magnitude" and not self.iterative)

    def _redundant(self, layout: ModelLayout, influence: Sequence[float]) -> list[int]:
        blocks = self.redundant(influence, self.count(layout)) if self.blocks is None else self.blocks
        return sorted(blocks)

    def _influence(self, context: Context) -> list[float]:
        """That of the original model, by first block; empty where the blocks are given."""
        if self.blocks is not None:
            return []
        span = self.count(context.layout) if self.choice == "contiguous" else 1
        return _measured_influence(context, span, context.cache)

    def _changes(self, decomposition: Decomposition, blocks: Collection[int], context: Context) -> CalibrationStore:
        """One backward pass over the calibration set for all of these blocks that the cache does not have."""
        model, layout = context.model, context.layout
        asked = {"quantity": "drop change", "ahead": self.ahead, "truncation": self.truncation.model_dump(mode="json")}
        makers = (type(self), type(self.truncation))
        key = calibration_key(model, context.samples, "loss", asked, makers, layout.linears)
        store, batches = CalibrationStore(context.cache, key), _batches(context)
        with store.missing(blocks) as missing:
            refs = [ref for ref in layout.linears if ref.block in missing]
            gradients = {}
            if refs:
                bar = Bar(context.progress, "gradients", len(batches))
                walk = BlockWalk(model, layout, batches)
                gradients = weight_gradients(walk, refs, ahead=self.ahead, on_batch=bar.advance)
            bar = Bar(context.progress, "scores", len(refs))
            for block in sorted(missing, reverse=True):
                found = {}
                for ref in refs:
                    if ref.block == block:
                        change = _change(context, decomposition, ref.name, gradients.pop(ref.name))
                        found[ref.name] = {"change": change.cpu()}
                        bar.advance()
                store.save(block, found)
        return store

    def _kept_of_one_pass(self, statistics: Statistics, context: Context) -> dict[str, list[int]]:
        redundant = self._redundant(context.layout, statistics.influence)
        ranks = self.ranks(context.layout, redundant)
        kept = {}
        for block in redundant:
            known = {} if statistics.changes is None else statistics.changes.load(block)
            for ref in _linears(context.layout, block):
                change = known[ref.name]["change"] if ref.name in known else None
                score = self.score(_sigma(statistics.decomposition, ref.name), change)
                kept[ref.name] = self.keep(ref, score, ranks[ref.name])
        return {name: components for name, components in kept.items() if components is not None}

    def _kept_in_turn(self, statistics: Statistics, context: Context) -> dict[str, list[int]]:
        """The published loop: what has been compressed stays in the model until all is."""
        model, layout, batches = context.model, context.layout, _batches(context)
        decomposition = statistics.decomposition
        redundant = self._redundant(layout, statistics.influence)
        order, ranks = redundant[::-1], self.ranks(layout, redundant)
        kept: dict[str, list[int]] = {}
        with frozen(model), ExitStack() as original:
            # From the last block on, those before the one at work are still the original's.
            walk = BlockWalk(model, layout, batches)
            if not self.iterative:
                walk.keep(order)
            bar = Bar(context.progress, "gradients", 2 * len(order) * len(batches))
            for turn in range(len(order)):
                if self.iterative:
                    influence = _measured_influence(context) if turn else statistics.influence
                    order = self.redundant(influence, len(order), already=order[:turn])
                    ranks = self.ranks(layout, order)
                for refs in _sublayers(_linears(layout, order[turn])):
                    gradients: dict[str, Tensor] = {}
                    if self.metric != "magnitude":
                        gradients = weight_gradients(walk, refs, ahead=self.ahead, on_batch=bar.advance)
                    for ref in refs:
                        change = None
                        if gradients:
                            change = _change(context, decomposition, ref.name, gradients.pop(ref.name))
                        score = self.score(_sigma(decomposition, ref.name), change)
                        chosen = self.keep(ref, score, ranks[ref.name])
                        if chosen is not None:
                            kept[ref.name] = chosen
                            original.callback(model.set_submodule, ref.name, model.get_submodule(ref.name))
                            _replace(context, decomposition, ref.name, chosen)
        return {ref.name: kept[ref.name] for ref in layout.linears if ref.name in kept}


def _candidate(ref: LinearRef) -> Candidate:
    return Candidate(ref.name, (ref,), torch.ones(1, dtype=torch.float64))


def _measured_influence(context: Context, span: int = 1, cache: Path | None = None) -> list[float]:
    """That of the model as it is; one that changes in every turn is not kept on disk."""
    found = block_influence(context.model, context.samples, span=span, cache=cache, progress=context.progress)
    return found.tolist()


def _sigma(decomposition: Decomposition, name: str) -> Float64[Tensor, " r"]:
    return decomposition.values[name].sqrt()


def _change(
    context: Context, decomposition: Decomposition, name: str, gradient: Float[Tensor, "out in"]
) -> Float64[Tensor, " r"]:
    """The loss's first-order change when a component is dropped, from ``dL/dW``."""
    weight = weight_of(context.model.get_submodule(name))
    return drop_change(decomposition.projection(name).components(weight), gradient.double())


def _replace(context: Context, decomposition: Decomposition, name: str, kept: Sequence[int]) -> None:
    """Leave these components of a matrix."""
    weight = weight_of(context.model.get_submodule(name))
    factors = decomposition.projection(name).only(kept).factors(weight, len(kept))
    replace_linear(context.model, name, factors)


def _batches(context: Context) -> list[dict[str, Tensor]]:
    return batches_of(context.model, context.samples)


def _outcome(plan: Plan, layout: ModelLayout) -> tuple[list[float], set[int]]:
    """Every block's influence, nan where runs of blocks were measured and none begins; the redundant blocks."""
    redundant = {ref.block for ref in layout.linears if ref.name in plan.kept}
    return [plan.scores.get(path, math.nan) for path in layout.blocks], redundant


def _linears(layout: ModelLayout, block: int) -> list[LinearRef]:
    return [ref for ref in layout.linears if ref.block == block]


def _sublayers(refs: Sequence[LinearRef]) -> tuple[list[LinearRef], list[LinearRef]]:
    """A decoder block's linears: those of the MLP, then those of the attention."""
    attention = [ref for ref in refs if ref.kind == "attention"]
    return [ref for ref in refs if ref.kind != "attention"], attention
