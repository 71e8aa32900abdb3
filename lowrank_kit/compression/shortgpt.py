"""Layer removal at work: one or two forward passes over the calibration set, then blocks are dropped."""

from functools import cached_property
from pathlib import Path

from jaxtyping import Float64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.compression.base import Compression
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.shortgpt import ShortGPT
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.plots.influence import influence_table, plot_influence


class ShortGPTCompression(Compression[ShortGPT]):
    """See `Compression`."""

    _progress: Progress | None = None

    def calibrate(self, progress: Progress | None = None) -> None:
        """Measure what every block does to the hidden states."""
        self._progress = progress
        _ = self._influence, self._distances

    def plan(self, progress: Progress | None = None) -> Plan:
        """Choose the blocks to drop."""
        self._progress = progress
        plan = self.method.plan(self.bench.layout, self._influence, self._distances)
        if progress:
            progress.console.print(influence_table(*self._outcome(plan)))
        return plan

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Drop them, in place."""
        drop_blocks(self.bench.model, self.bench.layout, plan.kept_blocks)
        return self.bench.model

    def plot(self, plan: Plan, folder: Path) -> None:
        """Every block's influence."""
        plot_influence(*self._outcome(plan), folder / "influence.png")

    def _outcome(self, plan: Plan) -> tuple[list[float], set[int]]:
        """Every block's influence, and the blocks to drop."""
        blocks = range(len(self.bench.layout.blocks))
        return [plan.scores[f"block {block}"] for block in blocks], set(blocks) - set(plan.kept_blocks)

    @cached_property
    def _influence(self) -> Float64[Tensor, " blocks"]:
        return self._measured(1)

    @cached_property
    def _distances(self) -> Float64[Tensor, " starts"]:
        span = self.method.span(self.bench.layout)
        return self._influence if span == 1 else self._measured(span)

    def _measured(self, span: int) -> Float64[Tensor, " starts"]:
        bench, distance = self.bench, self.method.distance
        return block_influence(
            bench.model,
            bench.layout,
            bench.samples,
            bench.batch_size,
            distance=distance,
            span=span,
            cache=bench.cache,
            progress=self._progress,
        )
