"""Prune&Comp: blocks go, and what passes them is rescaled to the magnitude that it had behind them (arXiv 2507.18212).

A removed block's scale is ``mean over channels of mean |h'| / mean |h|``, with h and h' the hidden states before and
behind it: means over the tokens of a window, channel by channel, and of their ratios over windows and channels, as the
authors' code has it. It multiplies the stream where the block was. As every norm divides by the length of what it
reads, dividing what all later blocks add by the scale comes to the same, but for the epsilon in the norms. The authors
multiply the embedding and what all earlier blocks add: that would change a head that is tied to the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float, Float64

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.influence import hidden_distance
from lowrank_kit.calibration.statistics import Distance
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import measured
from lowrank_kit.calibration.walk import Block, BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.blocks import block_sizes, check_joining, fewest_blocks, ranks_with
from lowrank_kit.models.depth import drop_blocks, scale_outputs
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.plan import Plan
from lowrank_kit.plots.block_scores import influence_table, plot_influence
from lowrank_kit.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Removal:
    """Every block's influence in the original model, and the scale of every block to go, in the order of removal."""

    influence: list[float]
    scales: dict[int, float]


class PruneComp(Compressor):
    """Drops as few blocks as reach the ratio, so up to one block's parameters more than asked for.

    What is left is a stock model with fewer blocks.
    """

    iterative: bool = True
    """The block of least influence goes, one after another, each measured with those before it gone and made up for;
    otherwise those of least influence in the original model."""
    distance: Distance = "cosine"
    """Influence: `cosine` is 1 - cos of the hidden states before and behind a block, `angular` is arccos(cos) / pi."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` where every block would go, or no scale can be merged into the blocks left."""
        fewest_blocks(layout, self.budget(layout))
        layout.select()
        check_joining(layout, f"method={self.name}", "added", "scaled")

    def calibrate(self, context: Context) -> Removal:
        """Find the blocks to go and their scales; every round is cached, and serves every ratio that needs it."""
        needed = fewest_blocks(context.layout, self.budget(context.layout))
        walk = BlockWalk(context.model, context.layout, batches_of(context.model, context.samples))
        bar = Bar(context.progress, "rounds", needed if self.iterative else 1)
        influence: list[float] = []
        scales: dict[int, float] = {}
        while len(scales) < needed:
            found = self._round(walk, context, scales)
            influence = influence or found["influence"].tolist()
            ascending = found["influence"].argsort(stable=True)[: 1 if self.iterative else needed].tolist()
            scales |= {block: float(found["scales"][block]) for block in ascending}
            bar.advance()
        return Removal(influence, scales)

    def plan(self, statistics: Removal, context: Context) -> Plan:
        """The blocks found go; their scales stand beside the influences."""
        sizes = block_sizes(context.layout)
        kept = tuple(block for block in range(len(sizes)) if block not in statistics.scales)
        scores = {f"block {block}": value for block, value in enumerate(statistics.influence)}
        scores |= {f"scale {block}": value for block, value in statistics.scales.items()}
        after = sum(sizes[block] for block in kept)
        if context.progress:
            context.progress.console.print(influence_table(statistics.influence, set(statistics.scales)))
        return Plan(self.name, ranks_with(context.layout, kept), kept, sum(sizes), after, scores)

    def apply(self, plan: Plan, statistics: Removal, context: Context) -> "PreTrainedModel":
        """Divide what every block adds by the scales of the removed ones before it, and drop these, in place."""
        for block in plan.kept_blocks:
            writers = [ref for ref in context.layout.linears if ref.block == block and ref.writes_residual]
            scale = prod(value for gone, value in statistics.scales.items() if gone < block)
            scale_outputs(context.model, writers, 1 / scale)
        drop_blocks(context.model, context.layout, plan.kept_blocks)
        return context.model

    def plot(self, plan: Plan, statistics: Removal, context: Context, folder: Path) -> None:
        """Every block's influence."""
        plot_influence(statistics.influence, set(statistics.scales), folder / "influence.png")

    def _round(
        self, walk: BlockWalk, context: Context, gone: dict[int, float]
    ) -> dict[str, Float64[Tensor, " blocks"]]:
        """Influence and scale of every block in the model without those ``gone``; theirs are infinite and 1."""
        asked = {"quantity": "magnitudes", "distance": self.distance, "gone": sorted(gone.items())}
        key = calibration_key(context.model, context.samples, "blocks", asked, (type(self),))
        store = CalibrationStore(context.cache, key)
        with store.missing([0]) as missing:
            if missing:
                store.save(0, {"blocks": self._measured(walk, context.samples.opening, gone)})
        return store.load(0)["blocks"]

    def _measured(self, walk: BlockWalk, opening: int, gone: dict[int, float]) -> dict[str, Float64[Tensor, " blocks"]]:
        influence = torch.full((len(walk.layout.blocks),), torch.inf, dtype=torch.float64)
        scales = torch.ones_like(influence)
        masks = [measured(batch["attention_mask"], opening).to(walk.model.device) for batch in walk.batches]
        for block in walk.forward():
            if block.index in gone:
                for number in walk.numbers:
                    walk.states[number] = walk.states[number] * gone[block.index]
            else:
                influence[block.index], scales[block.index] = self._passed(block, masks)
            block.is_passed = True
        return {"influence": influence, "scales": scales}

    def _passed(self, block: Block, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Take all batches through a block; its influence and its scale."""
        distances: list[Tensor] = []
        ratios: list[Tensor] = []
        states = block.walk.states
        for number, mask in enumerate(masks):
            before, after = states[number], block.run(number)
            distances.append(hidden_distance(before, after, mask, self.distance))
            for row, counted in enumerate(mask):
                ratios.append(_magnitudes(after[row, counted]) / _magnitudes(before[row, counted]))
            states[number] = after
        influence, scale = torch.cat(distances).mean(), torch.stack(ratios).mean()
        if not (influence + scale).isfinite():
            raise LowRankKitError(
                f"the hidden states around {block.walk.layout.blocks[block.index]} are not finite (use dtype=bfloat16 "
                "or float32), or one of their channels is zero"
            )
        return influence, scale


def _magnitudes(states: Float[Tensor, "tokens d"]) -> Float64[Tensor, " d"]:
    return states.double().abs().mean(0)
