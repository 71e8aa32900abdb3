"""LaCo at work: merges are tried on copies of blocks, from stored hidden states on; the plan repeats those accepted."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from lowrank_kit.calibration.texts import CalibrationSamples, measured
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compression.base import Compression
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.laco import Differences, LaCo, Merge
from lowrank_kit.models.depth import collapse, drop_blocks, take_matrices
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.plots.influence import plot_influence


def combine(base: nn.Module, members: Sequence[nn.Module], differences: Differences) -> None:
    """Merge the members into the base, in place, as `LaCo.differences` says."""
    if differences == "original":
        collapse(base, members)
    else:
        take_matrices(base, members[-1])


class LaCoCompression(Compression[LaCo]):
    """See `Compression`."""

    def calibrate(self, progress: Progress | None = None) -> None:
        """Nothing: which merges are measured depends on the ratio, so `plan` does it."""

    def plan(self, progress: Progress | None = None) -> Plan:
        """Find the merges."""
        bench, method = self.bench, self.method
        few = tuple(
            {name: values[: method.sentence_tokens] for name, values in sample.items()}
            for sample in bench.samples.sequences[: method.sentences]
        )
        texts = replace(bench.samples, sequences=few)
        was_training = bench.model.training
        bench.model.eval()
        try:
            trials = MergeTrials(bench.model, bench.layout, texts, bench.batch_size, method.differences, progress)
            return method.plan(bench.layout, trials.similarity)
        finally:
            bench.model.train(was_training)

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Merge as planned and drop what was merged, in place."""
        bench = self.bench
        for merge in self.method.merges(plan):
            base, *members = (bench.model.get_submodule(bench.layout.blocks[i]) for i in (merge.base, *merge.members))
            combine(base, members, self.method.differences)
        drop_blocks(bench.model, bench.layout, plan.kept_blocks)
        return bench.model

    def plot(self, plan: Plan, folder: Path) -> None:
        """The similarity after a merge into each block that was tried."""
        similarity = [plan.scores.get(f"block {block}", math.nan) for block in range(len(self.bench.layout.blocks))]
        bases = {merge.base for merge in self.method.merges(plan)}
        plot_influence(similarity, bases, folder / "similarity.png", "similarity after the merge", "merged into")


class MergeTrials:
    """Measures merges without touching the model: hidden states before every block are kept from one forward pass.

    Only what stands from the lowest base on is run again. Memory: a copy of every merged block; the hidden states wait
    as `Hidden` says. The model must be in evaluation mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        samples: CalibrationSamples,
        batch_size: int,
        differences: Differences,
        progress: Progress | None = None,
    ) -> None:
        self._differences = differences
        self._norm = nn.Identity() if layout.final_norm is None else model.get_submodule(layout.final_norm)
        self._progress = progress
        self._task = progress.add_task("merges tried", total=None) if progress else None
        batches = samples.batches(batch_size, model.config.get_text_config().pad_token_id or 0)
        self._walk = BlockWalk(model, layout, batches)
        self._last = len(layout.blocks)
        self._walk.keep(range(self._last + 1))
        self._masks = [measured(batch["attention_mask"], samples.opening).to(model.device) for batch in batches]
        self._blocks = [model.get_submodule(path) for path in layout.blocks]
        self._prefix: tuple[tuple[Merge, ...], dict[int, nn.Module]] = ((), dict(enumerate(self._blocks)))

    def similarity(self, merges: tuple[Merge, ...]) -> float:
        """See `lowrank_kit.methods.laco.Similarity`: of a whole text's representations, after the final norm.

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
        if self._progress and self._task is not None:
            self._progress.advance(self._task)
        mean = sum(found) / len(found)
        if not math.isfinite(mean):
            raise LowRankKitError(
                f"the last hidden states, of the model or merged into block {lowest} and above, are not finite: use "
                "dtype=bfloat16 or float32"
            )
        return mean

    def _present(self, merges: tuple[Merge, ...]) -> dict[int, nn.Module]:
        """The blocks after these merges, by original index; those of the last call are remembered."""
        if self._prefix[0] != merges:
            blocks = dict(enumerate(self._blocks))
            for merge in merges:
                blocks = self._merged(blocks, merge)
            self._prefix = (merges, blocks)
        return self._prefix[1]

    def _merged(self, blocks: dict[int, nn.Module], merge: Merge) -> dict[int, nn.Module]:
        base = deepcopy(blocks[merge.base])
        combine(base, [blocks[member] for member in merge.members], self._differences)
        return {index: block for index, block in blocks.items() if index not in merge.members} | {merge.base: base}

    @torch.no_grad()
    def _normed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return (self._norm(hidden) * mask[..., None]).double()


def _text_similarities(
    first: Float[Tensor, "rows tokens hidden"], second: Float[Tensor, "rows tokens hidden"]
) -> Float[Tensor, " rows"]:
    return cosine_similarity(first.flatten(1), second.flatten(1))
