"""LLM-Pruner at work: score heads and channels once for every ratio, then take the lowest out."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.gradients import STATISTICS_BYTES, weight_gradients
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compression.base import Compression
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.llm_pruner import LLMPruner
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import Units
from lowrank_kit.plots.units import plot_kept_units


class PrunerCompression(Compression[LLMPruner]):
    """See `Compression`."""

    _progress: Progress | None = None

    def calibrate(self, progress: Progress | None = None) -> None:
        """Score every unit; the scores go to the content-keyed cache, for every ratio to come."""
        self._progress = progress
        _ = self._scores

    def plan(self, progress: Progress | None = None) -> Plan:
        """Choose heads and channels."""
        self._progress = progress
        return self.method.plan(self.bench.layout, self._scores)

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Take out the units that are not kept, in place."""
        for units in self._units:
            keep_units(self.bench.model, units, plan.kept[units.name])
        return self.bench.model

    def plot(self, plan: Plan, folder: Path) -> None:
        """The kept share of every block's heads and channels."""
        kept: dict[str, dict[int, float]] = defaultdict(dict)
        for u in self._units:
            kept[u.kind][u.block] = len(plan.kept[u.name]) / u.count
        plot_kept_units(kept, len(self.bench.layout.blocks), folder / "kept_units.png")

    @cached_property
    def _units(self) -> list[Units]:
        return self.method.units(self.bench.layout)

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        if self.method.importance == "magnitude":
            return {u.name: u.scores({ref.name: self._weight(ref.name) ** 2 for ref in u.linears}) for u in self._units}
        by_block = {block: list(units) for block, units in groupby(self._units, lambda u: u.block)}
        bench = self.bench
        if bench.cache is None:
            passes = self._taylor(list(by_block.values()))
            return {name: values for _, scores in passes for name, values in scores.items()}
        refs = [ref for u in self._units for ref in u.linears]
        key = calibration_key(
            bench.model,
            bench.layout,
            bench.samples,
            bench.batch_size,
            "loss",
            {"quantity": "scores of units", "importance": self.method.importance},
            (type(self.method),),
            refs,
        )
        store = CalibrationStore(bench.cache, key)
        with store.missing(by_block) as missing:
            for units, scores in self._taylor([by_block[block] for block in by_block if block in missing]):
                store.save(units[0].block, {name: {"scores": values} for name, values in scores.items()})
        return {name: kept["scores"] for block in by_block for name, kept in store.load(block).items()}

    def _taylor(self, blocks: Sequence[list[Units]]) -> Iterator[tuple[list[Units], dict[str, Tensor]]]:
        """Score block by block; one backward pass over the calibration set gives as many as fit in memory."""
        if not blocks:
            return
        bench = self.bench
        walk = BlockWalk(bench.model, bench.layout, batches_of(bench.model, bench.samples, bench.batch_size))
        at_once = max(1, STATISTICS_BYTES // (4 * sum(u.cost * u.count for u in blocks[0])))
        passes = [blocks[i : i + at_once] for i in range(0, len(blocks), at_once)]
        bar = self._progress.add_task("gradients", total=len(passes) * len(walk.batches)) if self._progress else None

        def advance() -> None:
            if self._progress and bar is not None:
                self._progress.advance(bar)

        for part in passes:
            refs = [ref for units in part for u in units for ref in u.linears]
            gradients = weight_gradients(walk, refs, on_batch=advance)
            for units in part:
                changes = {
                    ref.name: (gradients.pop(ref.name) * self._weight(ref.name)).abs()
                    for u in units
                    for ref in u.linears
                }
                yield units, {u.name: u.scores(changes).cpu() for u in units}

    def _weight(self, name: str) -> Tensor:
        return weight_of(check_linear(self.bench.model.get_submodule(name), name)).detach().float()
