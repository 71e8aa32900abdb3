"""Layer removal: the blocks that change the hidden states least are dropped.

ShortGPT (arXiv 2403.03853) removes those of lowest block influence, wherever they are: the default. "The
Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887) removes the run of consecutive blocks between
whose ends the angular distance is least: `choice=contiguous distance=angular`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxtyping import Float64
from pydantic import Field, field_validator

from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.statistics import Distance
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.blocks import block_sizes, fewest_blocks, ranks_with
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.plan import Plan
from lowrank_kit.plots.block_scores import influence_table, plot_influence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distances:
    """What every block does to the hidden states, and what every run of blocks does of which one may go."""

    influence: Float64[Tensor, " blocks"]
    runs: Float64[Tensor, " starts"]


class ShortGPT(Compressor):
    """Drops as few blocks as reach the ratio, so up to one block's parameters more than asked for.

    What is left is a stock model with fewer blocks.
    """

    choice: Literal["free", "contiguous"] = "free"
    """`free` drops the blocks of lowest influence; `contiguous` one run of blocks, by the distance across it."""
    distance: Distance = "cosine"
    """`cosine` is 1 - cos of the hidden states before and after, `angular` is arccos(cos) / pi."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Block indices to drop, counted from 0, whatever their influence; null: chosen by `choice`."""

    @field_validator("blocks")
    @classmethod
    def _blocks_differ(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks is not None and len(set(blocks)) < len(blocks):
            raise ValueError("a block is named twice")
        return blocks

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` if every block would go, or forced ones do not exist or are too few."""
        count, needed = len(layout.blocks), fewest_blocks(layout, self.budget(layout))
        layout.select()
        if self.blocks is None:
            return
        if absent := [block for block in self.blocks if block >= count]:
            raise ConfigError(f"method.blocks: there is no block {absent[0]}; legal are 0 to {count - 1}")
        if len(self.blocks) == count:
            raise ConfigError(f"method.blocks names all {count} blocks: leave at least one out")
        if len(self.blocks) < needed:
            raise ConfigError(
                f"method.blocks names {len(self.blocks)} blocks of {count}, but method.ratio={self.ratio:g} takes "
                f"{needed}: name more, or lower method.ratio to {int(len(self.blocks) / count * 1e4) / 1e4:g}"
            )

    def span(self, layout: ModelLayout) -> int:
        """Length of the runs of blocks whose distance decides: 1 for a free choice or a forced one."""
        chosen_by_run = self.choice == "contiguous" and self.blocks is None
        return fewest_blocks(layout, self.budget(layout)) if chosen_by_run else 1

    def calibrate(self, context: Context) -> Distances:
        """Measure what every block, or every run of blocks, does to the hidden states."""
        influence, span = self._measured(context, 1), self.span(context.layout)
        return Distances(influence, influence if span == 1 else self._measured(context, span))

    def plan(self, statistics: Distances, context: Context) -> Plan:
        """Choose the blocks to drop."""
        plan = self.decide(context.layout, statistics.influence, statistics.runs)
        if context.progress:
            context.progress.console.print(influence_table(*_outcome(plan)))
        return plan

    def apply(self, plan: Plan, statistics: Distances, context: Context) -> "PreTrainedModel":
        """Drop them, in place."""
        drop_blocks(context.model, context.layout, plan.kept_blocks)
        return context.model

    def plot(self, plan: Plan, statistics: Distances, context: Context, folder: Path) -> None:
        """Every block's influence."""
        plot_influence(*_outcome(plan), folder / "influence.png")

    def decide(
        self, layout: ModelLayout, influence: Float64[Tensor, " blocks"], distances: Float64[Tensor, " starts"]
    ) -> Plan:
        """Decide which blocks go.

        Args:
            layout: the model's layout.
            influence: every block's own, for the record.
            distances: across every run of `span` blocks; the first of equals is taken.
        """
        removed = set(self.blocks or self._chosen(layout, distances))
        kept = tuple(block for block in range(len(layout.blocks)) if block not in removed)
        sizes = block_sizes(layout)
        scores = {f"block {block}": value for block, value in enumerate(influence.tolist())}
        if (span := self.span(layout)) > 1:
            scores |= {f"blocks {i}-{i + span - 1}": value for i, value in enumerate(distances.tolist())}
        after = sum(sizes[block] for block in kept)
        return Plan(self.name, ranks_with(layout, kept), kept, sum(sizes), after, scores)

    def _chosen(self, layout: ModelLayout, distances: Tensor) -> list[int]:
        if self.choice == "contiguous":
            first = int(distances.argmin())
            return list(range(first, first + self.span(layout)))
        return distances.argsort(stable=True)[: fewest_blocks(layout, self.budget(layout))].tolist()

    def _measured(self, context: Context, span: int) -> Float64[Tensor, " starts"]:
        return block_influence(
            context.model,
            context.samples,
            distance=self.distance,
            span=span,
            cache=context.cache,
            progress=context.progress,
        )


def _outcome(plan: Plan) -> tuple[list[float], set[int]]:
    """Every block's influence, and the blocks to drop."""
    influence = [value for name, value in plan.scores.items() if name.startswith("block ")]
    return influence, set(range(len(influence))) - set(plan.kept_blocks)
