"""LaCo: several neighbouring blocks collapse into one by adding up their differences (arXiv 2402.11187).

From the paper: the merge, the order in which merges are tried, and the acceptance of one whose final
representations stay similar enough to the original model's. Ours: the search for the threshold that meets a ratio
(the paper tunes it by hand) and the stop once the ratio is met. Text and released code differ in the merge:
`LaCo.differences`.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from jaxtyping import Float
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.texts import CalibrationSamples, measured
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.blocks import block_sizes, fewest_blocks, ranks_with
from lowrank_kit.models.depth import collapse, drop_blocks, take_matrices
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.modes import evaluating
from lowrank_kit.plan import Plan
from lowrank_kit.plots.block_scores import plot_influence
from lowrank_kit.progress import Bar

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import nn
    from transformers import PreTrainedModel

Differences = Literal["original", "running"]


@dataclass(frozen=True)
class Merge:
    """The blocks ``members`` go into the block ``base``, as they are by then: indices in the original model."""

    base: int
    members: tuple[int, ...]


Similarity = Callable[[tuple[Merge, ...]], float]
"""Mean cosine similarity of the final representations, original model against that after these merges in order."""


@dataclass(frozen=True)
class Collapse:
    """Accepted merges in order, and the similarity measured for every base that was tried."""

    merges: tuple[Merge, ...]
    similarities: dict[int, float]

    @property
    def removed(self) -> set[int]:
        """The blocks that are gone."""
        return {member for merge in self.merges for member in merge.members}


class LaCo(Compressor):
    """Collapses as few blocks as reach the ratio, so up to one block's parameters more than asked for go.

    What is left is a stock model with fewer blocks. Defaults are the released code's for Baichuan2-13B (for
    Llama-2-13B: merged 7, threshold 0.45).
    """

    merged: int = Field(default=3, ge=2)
    """Blocks that become one in a merge (C). The last merge takes fewer where that meets the ratio."""
    lowest: int = Field(default=0, ge=0)
    """Lowest block to merge into (L), counted from 0."""
    highest: int | None = Field(default=None, ge=1)
    """The first merge tried ends just below this block (H), counted from 0; null: the last one."""
    differences: Differences = "running"
    """What is subtracted from every merged block: `running`, the sum so far (the released code), which leaves the
    matrices of the last merged block, and norms and biases of the base; or `original`, the base as it was (the
    paper's text), which takes the model apart where neighbouring blocks are unlike each other."""
    interval: int = Field(default=1, ge=1)
    """Blocks between the bases of neighbouring merges (I), at least."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """A merge is accepted above this similarity (T). null: a multiple of 0.01 that meets the ratio where 0.01 more
    does not, found by bisection."""
    sentences: int = Field(default=10, ge=1)
    """Calibration windows on which similarity is measured, the first ones, or all if there are fewer."""
    sentence_tokens: int = Field(default=32, ge=1)
    """Tokens read of such a window: the paper's sentences are short."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` where even accepting every merge would not reach the ratio, or blocks are not alike."""
        layout.select()
        shapes = [(ref.block, (ref.role, ref.expert, ref.out_features, ref.in_features)) for ref in layout.linears]
        if len({tuple(shape for b, shape in shapes if b == block) for block in range(len(layout.blocks))}) > 1:
            raise ConfigError(
                f"method={self.name} adds differences of blocks, and those of this {layout.model_type} differ in their "
                "matrices: some have experts, or other widths"
            )
        last, needed = len(layout.blocks) - 1, fewest_blocks(layout, self.budget(layout))
        if self.highest is not None and self.highest > last:
            raise ConfigError(f"method.highest={self.highest}: there is no such block; legal are 1 to {last}")
        if self._first(layout) < self.lowest:
            raise ConfigError(
                f"method.lowest={self.lowest} leaves no room for a merge of {self.merged} blocks below block "
                f"{self._highest(layout)}: lower method.lowest or method.merged"
            )
        possible = len(self.scan(layout, -math.inf, lambda _: 0.0).removed)
        if possible < needed:
            raise ConfigError(
                f"method.ratio={self.ratio:g} takes {needed} blocks of {last + 1} away, but merges of {self.merged} "
                f"blocks between {self.lowest} and {self._highest(layout)}, {self.interval} apart, at most {possible}: "
                "lower method.ratio, method.lowest or method.interval, or raise method.merged"
            )

    def plan(self, statistics: None, context: Context) -> Plan:
        """Find the merges. Which of them are measured depends on the ratio: nothing is kept for another one."""
        few = tuple(
            {name: values[: self.sentence_tokens] for name, values in sample.items()}
            for sample in context.samples.sequences[: self.sentences]
        )
        texts, model = replace(context.samples, sequences=few), context.model
        with evaluating(model):
            trials = MergeTrials(model, context.layout, texts, self.differences, context.progress)
            return self.decide(context.layout, trials.similarity)

    def apply(self, plan: Plan, statistics: None, context: Context) -> "PreTrainedModel":
        """Merge as planned and drop what was merged, in place."""
        model, blocks = context.model, context.layout.blocks
        for merge in self.merges(plan):
            base, *members = (model.get_submodule(blocks[index]) for index in (merge.base, *merge.members))
            combine(base, members, self.differences)
        drop_blocks(model, context.layout, plan.kept_blocks)
        return model

    def plot(self, plan: Plan, statistics: None, context: Context, folder: Path) -> None:
        """The similarity after a merge into each block that was tried."""
        similarity = [plan.scores.get(f"block {block}", math.nan) for block in range(len(context.layout.blocks))]
        bases = {merge.base for merge in self.merges(plan)}
        plot_influence(similarity, bases, folder / "similarity.png", "similarity after the merge", "merged into")

    def decide(self, layout: ModelLayout, similarity: Similarity) -> Plan:
        """Decide the merges. Raises `LowRankKitError` where a given threshold accepts too few for the ratio."""
        threshold, found = self._search(layout, similarity)
        kept = tuple(block for block in range(len(layout.blocks)) if block not in found.removed)
        sizes = block_sizes(layout)
        return Plan(
            self.name,
            ranks_with(layout, kept),
            kept,
            parameters_before=sum(sizes),
            parameters_after=sum(sizes[block] for block in kept),
            scores={"threshold": threshold} | {f"block {base}": value for base, value in found.similarities.items()},
            kept={f"block {merge.base}": list(merge.members) for merge in found.merges},
        )

    def merges(self, plan: Plan) -> tuple[Merge, ...]:
        """The merges of a plan, in order: from the last block to the first."""
        found = [Merge(int(name.removeprefix("block ")), tuple(members)) for name, members in plan.kept.items()]
        return tuple(sorted(found, key=lambda merge: -merge.base))

    def scan(self, layout: ModelLayout, threshold: float, similarity: Similarity) -> Collapse:
        """Try merges downwards (the paper's algorithm 1) until enough blocks are gone or `lowest` is passed."""
        needed = fewest_blocks(layout, self.budget(layout))
        present = list(range(len(layout.blocks)))
        merges: tuple[Merge, ...] = ()
        similarities: dict[int, float] = {}
        base = self._first(layout)
        while base >= self.lowest and needed > 0:
            # No block up to the base has been touched: it stands at its own index.
            members = tuple(present[base + 1 : base + 1 + min(self.merged - 1, needed)])
            trial = (*merges, Merge(base, members))
            similarities[base] = similarity(trial)
            if similarities[base] > threshold:
                merges, needed = trial, needed - len(members)
                present = [block for block in present if block not in members]
                base -= self.interval
            else:
                base -= 1
        return Collapse(merges, similarities)

    def _search(self, layout: ModelLayout, similarity: Similarity) -> tuple[float, Collapse]:
        """The threshold, given or found, and what it lets through; no merge is measured twice."""
        needed, remembered = fewest_blocks(layout, self.budget(layout)), cache(similarity)
        if self.threshold is not None:
            found = self.scan(layout, self.threshold, remembered)
            if len(found.removed) < needed:
                self._explain_too_few(found, needed)
            return self.threshold, found
        # In hundredths: the lower one lets enough blocks go, the higher one does not.
        low, high = -100, 100
        while high - low > 1:
            middle = (low + high) // 2
            if len(self.scan(layout, middle / 100, remembered).removed) < needed:
                high = middle
            else:
                low = middle
        return low / 100, self.scan(layout, low / 100, remembered)

    def _explain_too_few(self, found: Collapse, needed: int) -> NoReturn:
        accepted = {merge.base for merge in found.merges}
        best = max(value for base, value in found.similarities.items() if base not in accepted)
        raise LowRankKitError(
            f"method.threshold={self.threshold:g} lets {len(found.removed)} blocks go and method.ratio={self.ratio:g} "
            f"takes {needed}: the best merge rejected has similarity {best:.4f}; lower the threshold below it, or set "
            "method.threshold=null"
        )

    def _highest(self, layout: ModelLayout) -> int:
        return len(layout.blocks) - 1 if self.highest is None else self.highest

    def _first(self, layout: ModelLayout) -> int:
        return self._highest(layout) - self.merged


def combine(base: "nn.Module", members: "Sequence[nn.Module]", differences: Differences) -> None:
    """Merge the members into the base, in place, as `LaCo.differences` says."""
    if differences == "original":
        collapse(base, members)
    else:
        take_matrices(base, members[-1])


class MergeTrials:
    """Measures merges without touching the model: hidden states before every block are kept from one forward pass.

    Only what stands from the lowest base on is run again. Memory: a copy of every merged block; the hidden states wait
    as `Hidden` says. The model must be in evaluation mode.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layout: ModelLayout,
        samples: CalibrationSamples,
        differences: Differences,
        progress: "Progress | None" = None,
    ) -> None:
        self._differences = differences
        self._norm = torch.nn.Identity() if layout.final_norm is None else model.get_submodule(layout.final_norm)
        self._bar = Bar(progress, "merges tried")
        batches = batches_of(model, samples)
        self._walk = BlockWalk(model, layout, batches)
        self._last = len(layout.blocks)
        self._walk.keep(range(self._last + 1))
        self._masks = [measured(batch["attention_mask"], samples.opening).to(model.device) for batch in batches]
        self._blocks = [model.get_submodule(path) for path in layout.blocks]
        self._prefix: tuple[tuple[Merge, ...], dict[int, nn.Module]] = ((), dict(enumerate(self._blocks)))

    def similarity(self, merges: tuple[Merge, ...]) -> float:
        """See `Similarity`: of a whole text's representations, after the final norm.

        Raises `LowRankKitError` where they are not finite.
        """
        blocks = self._merged(self._present(merges[:-1]), merges[-1])
        lowest = merges[-1].base
        found: list[float] = []
        for number, mask in enumerate(self._masks):
            hidden = self._walk.kept(lowest, number)
            for index in sorted(index for index in blocks if index >= lowest):
                hidden = self._walk.run(index, number, hidden, blocks[index])
            original = self._normed(self._walk.kept(self._last, number), mask)
            found += _text_similarities(original, self._normed(hidden, mask)).tolist()
        self._bar.advance()
        mean = sum(found) / len(found)
        if not math.isfinite(mean):
            raise LowRankKitError(
                f"the last hidden states, of the model or merged into block {lowest} and above, are not finite: use "
                "dtype=bfloat16 or float32"
            )
        return mean

    def _present(self, merges: tuple[Merge, ...]) -> dict[int, "nn.Module"]:
        """The blocks after these merges, by original index; those of the last call are remembered."""
        if self._prefix[0] != merges:
            blocks = dict(enumerate(self._blocks))
            for merge in merges:
                blocks = self._merged(blocks, merge)
            self._prefix = (merges, blocks)
        return self._prefix[1]

    def _merged(self, blocks: dict[int, "nn.Module"], merge: Merge) -> dict[int, "nn.Module"]:
        base = deepcopy(blocks[merge.base])
        combine(base, [blocks[member] for member in merge.members], self._differences)
        return {index: block for index, block in blocks.items() if index not in merge.members} | {merge.base: base}

    @no_grad
    def _normed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return (self._norm(hidden) * mask[..., None]).double()


def _text_similarities(
    first: Float[Tensor, "rows tokens hidden"], second: Float[Tensor, "rows tokens hidden"]
) -> Float[Tensor, " rows"]:
    return torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1))
