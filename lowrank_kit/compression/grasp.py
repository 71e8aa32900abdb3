"""GRASP at work: block influence, gradients, scores of singular components (arXiv 2501.00339, algorithm 1)."""

import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from jaxtyping import Float, Float64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.allocation.uniform import Uniform
from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.walk import BlockWalk, frozen
from lowrank_kit.compression.base import Compression
from lowrank_kit.compression.decompose import Decomposition, decompose
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.grasp import Grasp
from lowrank_kit.methods.svd import TruncatedSVD
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.linear import weight_of
from lowrank_kit.plots.influence import influence_table, plot_influence
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.spectral.attribution import drop_change
from lowrank_kit.spectral.truncate import Projection


class GraspCompression(Compression[Grasp]):
    """See `Compression`. The scores of a single pass are cached by block, for every ratio and both gradient metrics."""

    _progress: Progress | None = None
    _decomposition: Decomposition | None = None

    def calibrate(self, progress: Progress | None = None) -> None:
        """Measure block influence; score the redundant blocks, unless that is a matter of the order of `plan`."""
        self._progress = progress
        self._decompose(self._candidates)
        if self._in_one_pass and self.method.metric != "magnitude":
            self._score(self._redundant)

    def plan(self, progress: Progress | None = None) -> Plan:
        """Choose blocks and components."""
        self._progress = progress
        kept = self._kept_of_one_pass() if self._in_one_pass else self._kept_in_turn()
        plan = self.method.plan(self.bench.layout, kept, self._influence)
        if progress and plan.scores:
            progress.console.print(influence_table(*self._outcome(plan), chosen="redundant"))
        return plan

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Replace every matrix of which components were chosen by these, in place."""
        self._progress = progress
        self._decompose({ref.block for ref in self.bench.layout.linears if ref.name in plan.kept})
        advance = self._bar("factorise", len(plan.kept))
        for name, kept in plan.kept.items():
            self._replace(name, kept)
            advance()
        return self.bench.model

    def plot(self, plan: Plan, folder: Path) -> None:
        """Influence of the blocks, and ranks."""
        linears = self.bench.layout.linears
        if plan.scores:
            plot_influence(*self._outcome(plan), folder / "influence.png", chosen="redundant")
        plot_rank_map(linears, plan.ranks, folder / "rank_map.png")
        plot_kept_ranks(linears, plan.ranks, folder / "kept_ranks.png")

    def _outcome(self, plan: Plan) -> tuple[list[float], set[int]]:
        """Every block's influence, nan where runs of blocks were measured and none begins; the redundant blocks."""
        layout = self.bench.layout
        redundant = {ref.block for ref in layout.linears if ref.name in plan.kept}
        return [plan.scores.get(path, math.nan) for path in layout.blocks], redundant

    @property
    def _in_one_pass(self) -> bool:
        """Singular values do not change when other blocks do: by magnitude, the order matters only to iteration."""
        method = self.method
        return not method.propagate or (method.metric == "magnitude" and not method.iterative)

    @property
    def _candidates(self) -> Collection[int]:
        """The blocks in which components may be chosen."""
        return range(len(self.bench.layout.blocks)) if self.method.iterative else self._redundant

    @cached_property
    def _redundant(self) -> list[int]:
        method = self.method
        if method.blocks is not None:
            return sorted(method.blocks)
        return sorted(method.redundant(self._influence, method.count(self.bench.layout)))

    @cached_property
    def _influence(self) -> list[float]:
        """That of the original model, by first block; empty where the blocks are given."""
        if self.method.blocks is not None:
            return []
        span = self.method.count(self.bench.layout) if self.method.choice == "contiguous" else 1
        return self._measured_influence(span, self._root)

    def _measured_influence(self, span: int = 1, cache: Path | None = None) -> list[float]:
        """That of the model as it is; one that changes in every turn is not kept on disk."""
        bench = self.bench
        return block_influence(
            bench.model, bench.layout, bench.samples, bench.batch_size, span=span, cache=cache, progress=self._progress
        ).tolist()

    def _score(self, blocks: Collection[int]) -> CalibrationStore:
        """One backward pass over the calibration set for all of these blocks that the cache does not have."""
        bench, truncation = self.bench, self.method.truncation.model_dump(mode="json")
        asked = {"quantity": "drop change", "ahead": self.method.ahead, "truncation": truncation}
        makers = (type(self.method), type(self.method.truncation))
        key = calibration_key(
            bench.model, bench.layout, bench.samples, bench.batch_size, "loss", asked, makers, bench.layout.linears
        )
        store = CalibrationStore(self._root, key)
        with store.missing(blocks) as missing:
            refs = [ref for ref in bench.layout.linears if ref.block in missing]
            walk = BlockWalk(bench.model, bench.layout, self._batches)
            gradients = self._gradients(refs, walk, self._bar("gradients", len(self._batches))) if refs else {}
            advance = self._bar("scores", len(refs))
            for block in sorted(missing, reverse=True):
                found = {}
                for ref in refs:
                    if ref.block == block:
                        found[ref.name] = {"change": self._change(ref.name, gradients.pop(ref.name)).cpu()}
                        advance()
                store.save(block, found)
        return store

    def _kept_of_one_pass(self) -> dict[str, list[int]]:
        method = self.method
        self._decompose(self._redundant)
        store = None if method.metric == "magnitude" else self._score(self._redundant)
        kept = {}
        ranks = method.ranks(self.bench.layout, self._redundant)
        for block in self._redundant:
            known = {} if store is None else store.load(block)
            for ref in _linears(self.bench.layout, block):
                change = known[ref.name]["change"] if ref.name in known else None
                kept[ref.name] = method.keep(ref, method.score(self._sigma(ref.name), change), ranks[ref.name])
        return {name: components for name, components in kept.items() if components is not None}

    def _kept_in_turn(self) -> dict[str, list[int]]:
        """The published loop: what has been compressed stays in the model until all is."""
        method, model, layout = self.method, self.bench.model, self.bench.layout
        order, ranks = self._redundant[::-1], method.ranks(layout, self._redundant)
        self._decompose(self._candidates)
        kept: dict[str, list[int]] = {}
        with frozen(model), ExitStack() as original:
            # From the last block on, those before the one at work are still the original's.
            walk = BlockWalk(model, layout, self._batches)
            if not method.iterative:
                walk.keep(order)
            advance = self._bar("gradients", 2 * len(order) * len(self._batches))
            for turn in range(len(order)):
                if method.iterative:
                    influence = self._measured_influence() if turn else self._influence
                    order = method.redundant(influence, len(order), already=order[:turn])
                    ranks = method.ranks(layout, order)
                for refs in _sublayers(_linears(layout, order[turn])):
                    gradients = self._gradients(refs, walk, advance)
                    for ref in refs:
                        change = self._change(ref.name, gradients.pop(ref.name)) if gradients else None
                        chosen = method.keep(ref, method.score(self._sigma(ref.name), change), ranks[ref.name])
                        if chosen is not None:
                            kept[ref.name] = chosen
                            original.callback(model.set_submodule, ref.name, model.get_submodule(ref.name))
                            self._replace(ref.name, chosen)
        return {ref.name: kept[ref.name] for ref in layout.linears if ref.name in kept}

    def _decompose(self, blocks: Collection[int]) -> None:
        """Find the components of the matrices in these blocks, unless that was done."""
        bench, method = self.bench, self.method
        if self._decomposition is None:
            svd = TruncatedSVD(name=method.name, ratio=method.ratio, truncation=method.truncation, allocation=Uniform())
            self._decomposition = decompose(
                bench.model,
                svd,
                bench.samples,
                batch_size=bench.batch_size,
                cache=self._root,
                blocks=blocks,
                progress=self._progress,
            )

    def _components(self, name: str) -> Projection:
        assert self._decomposition is not None
        return self._decomposition.projection(name)

    def _sigma(self, name: str) -> Float64[Tensor, " r"]:
        return self._components(name).values.sqrt()

    def _change(self, name: str, gradient: Float[Tensor, "out in"]) -> Float64[Tensor, " r"]:
        """The loss's first-order change when a component is dropped, from ``dL/dW``."""
        weight = weight_of(self.bench.model.get_submodule(name))
        return drop_change(*self._components(name).components(weight), gradient.double())

    def _replace(self, name: str, kept: Sequence[int]) -> None:
        """Leave these components of a matrix."""
        model = self.bench.model
        up, down = self._components(name).only(kept).factors(weight_of(model.get_submodule(name)), len(kept))
        replace_linear(model, name, up, down)

    def _gradients(
        self, refs: Sequence[LinearRef], walk: BlockWalk, on_batch: Callable[[], object]
    ) -> dict[str, Tensor]:
        """``dL/dW`` by name, in one backward pass; nothing where the metric does not read it."""
        if self.method.metric == "magnitude":
            return {}
        return weight_gradients(walk, refs, ahead=self.method.ahead, on_batch=on_batch)

    @cached_property
    def _batches(self) -> list[dict[str, Tensor]]:
        bench = self.bench
        return batches_of(bench.model, bench.samples, bench.batch_size)

    @cached_property
    def _root(self) -> Path:
        if self.bench.cache is not None:
            return self.bench.cache
        self._keeps_alive = tempfile.TemporaryDirectory(prefix="lowrank_kit-")
        return Path(self._keeps_alive.name)

    def _bar(self, description: str, total: int) -> Callable[[], None]:
        if self._progress is None:
            return lambda: None
        progress, task = self._progress, self._progress.add_task(description, total=total)
        return lambda: progress.advance(task)


def _linears(layout: ModelLayout, block: int) -> list[LinearRef]:
    return [ref for ref in layout.linears if ref.block == block]


def _sublayers(refs: Sequence[LinearRef]) -> tuple[list[LinearRef], list[LinearRef]]:
    """A decoder block's linears: those of the MLP, then those of the attention."""
    attention = [ref for ref in refs if ref.kind == "attention"]
    return [ref for ref in refs if ref.kind != "attention"], attention
