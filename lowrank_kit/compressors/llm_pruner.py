"""LLM-Pruner: whole attention heads and MLP channels, judged by their first-order effect (arXiv 2305.11627)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.gradients import STATISTICS_BYTES, weight_gradients
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import LOWRANK_PREFIX
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import Units, units_of
from lowrank_kit.plan import Plan
from lowrank_kit.plots.kept_units import plot_kept_units
from lowrank_kit.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Mapping[str, Float[Tensor, " units"]]
"""The score of every unit, by name of the `Units`."""


class LLMPruner(Compressor):
    """Block-wise structured pruning: the same share of heads and of channels from every block that is not protected.

    A head is a key-value head with its query heads: rows of q, k, v and columns of o. A channel is a row of gate and
    up and a column of down. Heads are coarse: each block loses the whole number of them below the share, and channels
    make up for the rest, one more in the first blocks than in the last where it does not come out even. The budget is
    met from below, by less than one channel.

    Defaults are the published ones for the 32 blocks of LLaMA-7B; biases are neither scored nor counted.
    """

    importance: Literal["taylor", "magnitude"] = "taylor"
    """`taylor`: sum over a unit's weights of |weight x gradient of the mean loss| (section 3.2, first order, per
    element); `magnitude`: sum of squared weights."""
    protect_first: int = Field(default=4, ge=0)
    """Blocks at the bottom that are left whole."""
    protect_last: int = Field(default=2, ge=0)
    """Blocks at the top that are left whole."""

    @property
    def reads_gradients(self) -> bool:
        """Scores are gradients, unless magnitudes are asked for."""
        return self.importance != "magnitude"

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for a family without separate matrices, or a ratio that the open blocks cannot give."""
        self.removed(layout)

    def units(self, layout: ModelLayout) -> list[Units]:
        """Heads and channels of the blocks that are not protected."""
        if layout.model_type.startswith(LOWRANK_PREFIX):
            raise ConfigError(
                f"method={self.name} prunes original models; this {layout.model_type} is compressed already"
            )
        blocks = range(self.protect_first, len(layout.blocks) - self.protect_last)
        if not blocks:
            raise ConfigError(
                f"method.protect_first={self.protect_first} and method.protect_last={self.protect_last} protect all "
                f"{len(layout.blocks)} blocks: their sum can be {len(layout.blocks) - 1} at most"
            )
        return units_of(layout, blocks)

    def removed(self, layout: ModelLayout) -> dict[str, int]:
        """How many units leave, by name. Raises `ConfigError` where even one of each a block is too much."""
        units = self.units(layout)
        heads, channels = ([u for u in units if u.kind == kind] for kind in ("heads", "channels"))
        total = layout.parameters
        target = total - self.budget(layout)
        most = {u.name: u.cost * (u.count - 1) for u in units}
        if target > sum(most.values()):
            highest = int(sum(most.values()) / total * 1e4) / 1e4
            raise ConfigError(
                f"method.ratio={self.ratio} cannot be met by the {len(heads)} of {len(layout.blocks)} blocks that are "
                f"not protected: the nearest feasible ratio is {highest}; or lower method.protect_first "
                f"({self.protect_first}) and method.protect_last ({self.protect_last})"
            )
        share = target / sum(u.cost * u.count for u in units)
        gone = [min(int(share * u.count), u.count - 1) for u in heads]
        # Near the highest ratio the channels alone cannot make up for what heads fall short of.
        while (rest := target - _cost(heads, gone)) > sum(most[u.name] for u in channels):
            gone = [min(n + 1, u.count - 1) for n, u in zip(gone, heads, strict=True)]
        each, one_more = divmod(max(0, -(-rest // channels[0].cost)), len(channels))
        found = {u.name: n for u, n in zip(heads, gone, strict=True)}
        return found | {u.name: each + (i < one_more) for i, u in enumerate(channels)}

    def calibrate(self, context: Context) -> Scores:
        """Score every unit; first-order scores go to the content-keyed cache, for every ratio to come."""
        units = self.units(context.layout)
        if self.importance == "magnitude":
            return {u.name: u.scores({ref.name: _weight(context, ref.name) ** 2 for ref in u.linears}) for u in units}
        by_block = {block: list(found) for block, found in groupby(units, lambda u: u.block)}
        store = self._store(context, units)
        with store.missing(by_block) as missing:
            for found, scores in _first_order(context, [by_block[block] for block in by_block if block in missing]):
                store.save(found[0].block, {name: {"scores": values} for name, values in scores.items()})
        return {name: kept["scores"] for block in by_block for name, kept in store.load(block).items()}

    def plan(self, statistics: Scores, context: Context) -> Plan:
        """Choose heads and channels."""
        return self.decide(context.layout, statistics)

    def apply(self, plan: Plan, statistics: Scores, context: Context) -> "PreTrainedModel":
        """Take out the units that are not kept, in place."""
        for units in self.units(context.layout):
            keep_units(context.model, units, plan.kept[units.name])
        return context.model

    def plot(self, plan: Plan, statistics: Scores, context: Context, folder: Path) -> None:
        """The kept share of every block's heads and channels."""
        kept: dict[str, dict[int, float]] = defaultdict(dict)
        for u in self.units(context.layout):
            kept[u.kind][u.block] = len(plan.kept[u.name]) / u.count
        plot_kept_units(kept, len(context.layout.blocks), folder / "kept_units.png")

    def decide(self, layout: ModelLayout, scores: Scores) -> Plan:
        """Keep the units with the highest scores, block by block."""
        units, removed = self.units(layout), self.removed(layout)
        ranks = {ref.name: ref.full_rank for ref in layout.linears}
        kept, lost = {}, {}
        for u in units:
            order = scores[u.name].argsort(descending=True, stable=True).tolist()
            left = u.count - removed[u.name]
            kept[u.name], lost[u.name] = sorted(order[:left]), float(scores[u.name][order[left:]].sum())
            ranks |= {ref.name: min(sides) for ref, *sides in u.sides(left)}
        before = layout.parameters
        after = before - _cost(units, [removed[u.name] for u in units])
        return Plan(self.name, ranks, tuple(range(len(layout.blocks))), before, after, lost, kept)

    def _store(self, context: Context, units: Sequence[Units]) -> CalibrationStore:
        key = calibration_key(
            context.model,
            context.samples,
            "loss",
            {"quantity": "scores of units", "importance": self.importance},
            (type(self),),
            [ref for u in units for ref in u.linears],
        )
        return CalibrationStore(context.cache, key)


def _cost(units: list[Units], removed: list[int]) -> int:
    return sum(u.cost * n for u, n in zip(units, removed, strict=True))


def _first_order(
    context: Context, blocks: Sequence[list[Units]]
) -> Iterator[tuple[list[Units], dict[str, Float[Tensor, " units"]]]]:
    """Score block by block; one backward pass over the calibration set gives as many as fit in memory."""
    if not blocks:
        return
    batches = batches_of(context.model, context.samples)
    walk = BlockWalk(context.model, context.layout, batches)
    at_once = max(1, STATISTICS_BYTES // (4 * sum(u.cost * u.count for u in blocks[0])))
    passes = [blocks[i : i + at_once] for i in range(0, len(blocks), at_once)]
    bar = Bar(context.progress, "gradients", len(passes) * len(batches))
    for part in passes:
        refs = [ref for units in part for u in units for ref in u.linears]
        gradients = weight_gradients(walk, refs, on_batch=bar.advance)
        for units in part:
            changes = {
                ref.name: (gradients.pop(ref.name) * _weight(context, ref.name)).abs()
                for u in units
                for ref in u.linears
            }
            yield units, {u.name: u.scores(changes).cpu() for u in units}


def _weight(context: Context, name: str) -> Float[Tensor, "out in"]:
    return weight_of(check_linear(context.model.get_submodule(name), name)).detach().float()
