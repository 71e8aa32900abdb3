"""Zero-Sum SVD in stages: truncate, pull the weights back along the loss's gradient, and truncate again."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import Statistics, TruncatedSVD
from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Weights = Mapping[str, Float[Tensor, "out in"]]

DAMPING = 1e-6
"""Added to the squared norm of a gradient that is divided by it; the authors' value."""


@dataclass(frozen=True)
class StagedStatistics(Statistics):
    """Of the weights that the last stage truncates; ``originals`` are those that the model came with, by name."""

    originals: Weights


class ZeroSumSVD(TruncatedSVD):
    """`TruncatedSVD` whose last truncation is of weights that earlier ones, and steps back from them, have left.

    A stage plans and truncates the whole model to the ratio. Then every truncated weight W' goes back towards the
    original W by the part of the difference that lies along the gradient G of the loss at W', all at once:
    ``W' + <G, W - W'> / (<G, G> + 1e-6) G``. What a plan leaves dense has its original weight again. The next stage
    calibrates that model and plans anew. (Zero-Sum SVD, arXiv 2602.02848; the authors' ``scripts/run_multistage.sh``
    with ``--pull_subspace --nsamples_subspace_proj 1``: one random calibration window a stage.)
    """

    stages: int = Field(default=1, ge=1)
    """Truncations, one after the other; 1: that of `TruncatedSVD`."""
    pull_tokens: int = Field(default=1024, ge=2)
    """The gradient of a step between stages is of the last so many tokens of one calibration window."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` also for what stages do not go with."""
        super().check(layout)
        if self.stages == 1:
            return
        if self.correction.kind != "none":
            raise ConfigError(
                f"method.stages={self.stages} with method.correction={self.correction.kind} would fit factors to the "
                "outputs of a model that stages have changed: use method.stages=1, or method.correction=none"
            )
        if self.structure.kind != "none":
            raise ConfigError(
                f"method.stages={self.stages} truncates matrices, and method.structure={self.structure.kind} takes "
                "parts of them away: use method.stages=1, or method.structure=none"
            )
        if self.truncation.span > 1:
            raise ConfigError(
                f"method.stages={self.stages} truncates single matrices, and the truncation {self.truncation.kind} "
                "joins blocks: use method.stages=1"
            )

    def check_streamed(self) -> None:
        """See `TruncatedSVD`; more than one stage is refused, too."""
        super().check_streamed()
        if self.stages > 1:
            raise ConfigError(
                f"method.stages={self.stages} changes all weights between its stages, and runtime.weights=streamed "
                "has one block in memory at a time: use weights=resident, or method.stages=1"
            )

    def calibrate(self, context: Context) -> Statistics:
        """Go through all stages but the last one, in place, and decompose what they leave."""
        if self.stages == 1:
            return super().calibrate(context)
        model = context.model
        originals = {
            ref.name: weight_of(model.get_submodule(ref.name)).detach().clone() for ref in self.targets(context.layout)
        }
        # Its own order: the same in every process that repeats the stages.
        order = torch.Generator().manual_seed(0)
        for stage in range(1, self.stages):
            found = super().calibrate(context)
            plan = super().plan(found, context)
            self._truncate(plan, found, originals, context)
            share = self._pull(plan, originals, context, order)
            log.info("stage %d of %d: pulled back by %.2g of what was cut", stage, self.stages, share)
        last = super().calibrate(context)
        return StagedStatistics(last.decomposition, last.influence, originals)

    def apply(self, plan: Plan, statistics: Statistics, context: Context) -> "PreTrainedModel":
        """See `TruncatedSVD`; what the plan leaves dense has its original weight."""
        if isinstance(statistics, StagedStatistics):
            for name, weight in statistics.originals.items():
                if plan.ranks[name] == min(weight.shape):
                    set_weight(context.model.get_submodule(name), weight)
        return super().apply(plan, statistics, context)

    @no_grad
    def _truncate(self, plan: Plan, found: Statistics, originals: Weights, context: Context) -> None:
        """Put the truncated weights, multiplied out, in the model's place."""
        for name, original in originals.items():
            module = context.model.get_submodule(name)
            weight, rank = original, plan.ranks[name]
            if rank < min(original.shape):
                weight = found.decomposition.projection(name).factors(weight_of(module), rank).dense()
            set_weight(module, weight)

    def _pull(self, plan: Plan, originals: Weights, context: Context, order: "torch.Generator") -> float:
        """Take every truncated weight back along the gradient; return the share of all differences that this was."""
        model, samples = context.model, context.samples
        [chosen] = torch.randint(len(samples.sequences), (1,), generator=order).tolist()
        window = {name: ids[-self.pull_tokens :] for name, ids in samples.sequences[chosen].items()}
        walk = BlockWalk(model, context.layout, batches_of(model, replace(samples, sequences=(window,))))
        refs = [ref for ref in context.layout.linears if ref.name in originals and plan.ranks[ref.name] < ref.full_rank]
        gone = pulled = 0.0
        for name, gradient in weight_gradients(walk, refs).items():
            module = model.get_submodule(name)
            weight = weight_of(module).detach().float()
            difference, length = originals[name].float() - weight, float(gradient.square().sum())
            along = float((gradient * difference).sum()) / (length + DAMPING)
            set_weight(module, weight + along * gradient)
            gone += float(difference.square().sum())
            pulled += along**2 * length
        return (pulled / gone) ** 0.5 if gone else 0.0
