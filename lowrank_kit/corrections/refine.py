"""Block-local refinement: a factorised block is trained to give what the original gave (AA-SVD, arXiv 2604.02119)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, cos, pi
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.walk import Block
from lowrank_kit.corrections.correction import Factorisation
from lowrank_kit.corrections.finished import FinishedBlocks
from lowrank_kit.corrections.refit import Refit, Targets
from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.truncate import damped_root
from lowrank_kit.truncations.truncation import Truncation

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

DAMPING = 0.1
"""Share of the mean added to the diagonal of the metric, so that no direction of a block's error is free."""


class Refine(Refit):
    """See `Refit`; every block it has factorised is then trained, by itself and without labels.

    The block reads what the compressed model gives it, and learns to give what the original block gave in the original
    model. All its parameters are trained (AdamW, linear warm-up, cosine), in float32, a batch of calibration windows a
    step. The last windows are held out of that, and of the closed form: training ends when they gain nothing any more,
    and the best pass stands. Only one block and its optimiser are held, beside the hidden states before and behind it.
    """

    trains: ClassVar[bool] = True

    kind: Literal["refine"] = "refine"
    """Marks the correction."""
    residual: bool = True
    """What training begins with: the closed form of `residual`; false: that of `sequential`."""
    weighting: Literal["none", "relative", "loss"] = "none"
    """Of a block's error e at a token: `none` is its square, as AA-SVD has it; `relative` is that over the mean square
    of what the block should give there: what reads it is behind a norm, and a few tokens, such as a window's first,
    are a thousand times as large as the others. `loss` is `relative` in the metric B, the second moment of the loss's
    gradients in what the block gives, a tenth of its mean added to the diagonal: directions that the loss does not
    see count for little."""
    passes: int = Field(default=8, ge=1)
    """Passes over the calibration windows, at most."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The highest; it rises from 0 over the first tenth of the steps, and falls to a tenth."""
    relative_steps: bool = False
    """Multiply the rate by the root mean square that a tensor has at the beginning: factors, pivot rows with their
    coefficients and narrower matrices differ in size by orders of magnitude, and AdamW's steps do not see that."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    held_out: float = Field(default=0.125, ge=0, lt=1)
    """Share of the calibration windows that decide when to stop; 0: none, and the last pass stands."""
    patience: int = Field(default=2, ge=1)
    """Passes in a row without gain on these windows, after which training ends."""

    @property
    def to_stream(self) -> bool:
        """See `Refit`."""
        return self.residual

    @model_validator(mode="after")
    def _weighs_the_stream(self) -> "Refine":
        if self.weighting == "loss" and not self.residual:
            raise ValueError("weighting=loss goes with residual=true, which reads the same gradients")
        return self

    def check(self, truncation: Truncation, refs: Sequence[LinearRef]) -> None:
        """See `Refit`; weights by the loss need a truncation that knows it."""
        super().check(truncation, refs)
        if self.weighting == "loss" and not truncation.of_loss:
            raise ConfigError(
                f"method.correction.weighting=loss reads the loss's gradients, which truncation={truncation.kind} does "
                "not collect: truncation=two_sided, or method.correction.weighting=none"
            )

    def fitted(self, numbers: Sequence[int]) -> Sequence[int]:
        """See `Refit`: those held out are not, or training could only lose to a closed form that has seen them."""
        return numbers[: len(numbers) - ceil(self.held_out * len(numbers))]

    def started(self, factors: LowRankFactors) -> LowRankFactors:
        """See `Refit`; the authors balance by the singular values that the metric sees, which depend on the tokens."""
        return factors.balanced()

    def factorise(self, work: Factorisation) -> None:
        """See `Correction`. Raises `ConfigError` where nothing is left to learn from, before the work."""
        batches = len(batches_of(work.model, work.samples))
        if ceil(self.held_out * batches) == batches:
            raise ConfigError(
                f"method.correction=refine holds out {self.held_out:g} of the calibration windows, and all of them are "
                f"read in {batches} batch(es): more calibration.samples, a lower calibration.batch_size, or "
                "method.correction.held_out=0"
            )
        super().factorise(work)

    def finish(self, block: Block, targets: Targets, finished: FinishedBlocks) -> None:
        """Train the block, from the last pass that a killed run has left of it."""
        learnt = self.fitted(block.walk.numbers)
        with _in_float32(block.module):
            training = _Training(self, block, targets, learnt, block.walk.numbers[len(learnt) :])
            training.run(finished)
        losses = training.losses
        log.debug("block %d: %s", block.index, " ".join(f"{loss:.4g}" for loss in losses))


class _Training:
    """Of one block, from pass to pass."""

    def __init__(
        self,
        settings: Refine,
        block: Block,
        targets: Targets,
        learnt: Sequence[int],
        held: Sequence[int],
    ) -> None:
        self._settings, self._block, self._targets = settings, block, targets
        self._learnt, self._held = learnt, held
        self._root = None
        if settings.weighting == "loss" and targets.metric is not None:
            self._root = damped_root(targets.metric / targets.metric.diagonal().mean(), DAMPING).float()
        self._parameters = dict(block.module.named_parameters())
        groups = [
            {"params": [p], "scale": float(p.detach().square().mean().sqrt()) if settings.relative_steps else 1.0}
            for p in self._parameters.values()
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self._best: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def run(self, finished: FinishedBlocks) -> None:
        """Train until nothing is gained, and leave the best parameters in the block."""
        state = finished.begun(self._block.index)
        if state is None:
            self._note()
        else:
            self._load(state)
        while len(self.losses) <= self._settings.passes and not self._is_stale():
            self._pass(len(self.losses) - 1)
            self._note()
            finished.begin(self._block.index, self._state())
        self._put(self._best)

    def _is_stale(self) -> bool:
        best = self.losses.index(min(self.losses))
        return bool(self._held) and len(self.losses) - 1 - best >= self._settings.patience

    def _pass(self, number: int) -> None:
        # Its own order for every pass, the same for a run that goes on.
        order = torch.randperm(len(self._learnt), generator=torch.Generator().manual_seed(number)).tolist()
        for step, chosen in enumerate(order, number * len(order)):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate(step) * group["scale"]
            self._optimizer.zero_grad()
            with torch.enable_grad():
                error = self._error(self._learnt[chosen])
            error.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
            self._optimizer.step()

    def _rate(self, step: int) -> float:
        steps = self._settings.passes * len(self._learnt)
        warm = ceil(steps / 10)
        share = (step + 1) / warm if step < warm else 0.55 + 0.45 * cos(pi * (step - warm) / (steps - warm))
        return self._settings.learning_rate * share

    def _error(self, number: int) -> Float[Tensor, ""]:
        """Mean squared error of a batch's outputs, BOS apart, as the settings weigh it."""
        output, target = (
            states[:, self._targets.opening :]
            for states in (self._block.recorded(number), self._targets.states[number])
        )
        error = output - target
        if self._settings.weighting != "none":
            error = error / target.square().mean(-1, keepdim=True).sqrt()
        return (error if self._root is None else error @ self._root).square().mean()

    @no_grad
    def _note(self) -> None:
        """Measure the held-out windows, and keep the parameters where they are the best ones."""
        self.losses.append(sum(float(self._error(number)) for number in self._held) / max(1, len(self._held)))
        if not self._held or self.losses[-1] == min(self.losses):
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @no_grad
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def _state(self) -> dict[str, Tensor]:
        moments = self._optimizer.state_dict()["state"]
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **{f"now.{name}": parameter for name, parameter in self._parameters.items()},
            **{f"best.{name}": tensor for name, tensor in self._best.items()},
            **{f"moment.{key}.{index}": tensor for index, found in moments.items() for key, tensor in found.items()},
        }

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.losses = state["losses"].tolist()
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            if kind == "moment":
                key, _, index = rest.rpartition(".")
                moments.setdefault(int(index), {})[key] = tensor
            elif rest:
                parts[kind][rest] = tensor
        self._put(parts["now"])
        self._best = {name: tensor.to(self._parameters[name]) for name, tensor in parts["best"].items()}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})


@contextmanager
def _in_float32(block: "nn.Module") -> Iterator[None]:
    """Parameters that are trained, in float32, or small steps would be rounded away; afterwards as they were."""
    dtype = next(block.parameters()).dtype
    wanted = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    block.float().requires_grad_()
    try:
        yield
    finally:
        block.to(dtype)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
