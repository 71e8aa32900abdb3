"""Where in activation space the update of a training lies."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.files import read_as, write_whole
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.eigenpairs import Which, output_eigenpairs, range_eigenpairs

# Directions a side, of a linear that has no rank because all of it is trained.
USUAL_DIRECTIONS = 8


@dataclass(frozen=True)
class Measurement:
    """The update of one linear at one step of the training.

    ``norm`` is the Frobenius norm of dW = W_now - W_original over that of W_original. ``top`` and ``tail`` are
    ``|U^T dW|^2 / |dW|^2`` with U the ``directions`` eigenvectors of largest or smallest eigenvalue of the output's
    second moment over the calibration samples, inside its range; ``chance`` is what random directions would hold.
    """

    step: int
    linear: str
    role: str
    block: int
    norm: float
    top: float
    tail: float
    chance: float


@dataclass(frozen=True)
class EnergyLog:
    """Where `Measurement`s are kept, and how many a training has. A resumed training goes on in its file."""

    file: Path
    count: int

    def read(self) -> list[Measurement]:
        """The measurements so far."""
        return list(read_as(self.file, tuple[Measurement, ...]) or ())

    def write(self, found: Sequence[Measurement]) -> None:
        """Replace them, whole or not at all."""
        text = json.dumps([asdict(one) for one in found])
        write_whole(self.file, lambda path: path.write_text(text, "utf-8"))


@dataclass(frozen=True)
class _Original:
    ref: LinearRef
    weight: Float[Tensor, "out in"]
    top: Float[Tensor, "out k"]
    tail: Float[Tensor, "out k"]


class UpdateEnergy(TrainerCallback):
    """Measures, a few times along a training, what share of the update lies in the top and the tail directions."""

    def __init__(self, model: PreTrainedModel, originals: Sequence[_Original], log: EnergyLog) -> None:
        self._model, self._originals, self._log = model, originals, log

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        refs: Sequence[LinearRef],
        ranks: Mapping[str, int],
        samples: CalibrationSamples,
        log: EnergyLog,
        cache: Path | None,
    ) -> "UpdateEnergy":
        """Before any adapter is put into ``model``: take the originals of these linears, and their directions.

        As many directions as the linear's rank in ``ranks``, but no more than half of its outputs' range can have.
        """
        count = {ref.name: min(ranks.get(ref.name, USUAL_DIRECTIONS), ref.full_rank // 2) for ref in refs}

        def reduce(statistics: LayerStatistics) -> Kept:
            module, wanted = model.get_submodule(statistics.ref.name), count[statistics.ref.name]
            return {side: _directions(statistics, module, wanted, side) for side in ("largest", "smallest")}

        reduction = Reduction(StatisticsRequest(moments="smaller"), reduce, cls, {"effects": count})
        kept = calibrate(model, samples.without_labels(), refs, reduction, cache=cache)
        originals = [
            _Original(
                ref,
                weight_of(model.get_submodule(ref.name)).detach().cpu().clone(),
                kept[ref.name]["largest"],
                kept[ref.name]["smallest"],
            )
            for ref in refs
        ]
        return cls(model, originals, log)

    def measure(self, step: int) -> list[Measurement]:
        """The update of every linear now."""
        return [_measured(self._model.get_submodule(original.ref.name), original, step) for original in self._originals]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget what was seen after the checkpoint that the training goes on from."""
        self._log.write([one for one in self._log.read() if one.step <= state.global_step])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure in equal distances, the last time at the end."""
        # Not after the first step: in a warm-up its learning rate is zero, and the update nothing but rounding.
        wanted = {round(state.max_steps * i / self._log.count) for i in range(1, self._log.count + 1)}
        if state.global_step in wanted:
            self._log.write([*self._log.read(), *self.measure(state.global_step)])


def sampled(targets: Sequence[LinearRef], blocks: int) -> list[LinearRef]:
    """Of these linears those of so many blocks, evenly spaced from the first to the last."""
    there = sorted({ref.block for ref in targets})
    count = min(blocks, len(there))
    chosen = {there[round(i * (len(there) - 1) / max(count - 1, 1))] for i in range(count)}
    return [ref for ref in targets if ref.block in chosen]


@torch.no_grad()
def weight_now(layer: nn.Module, in_features: int) -> Float[Tensor, "out in"]:
    """The weight that a linear layer acts with, whatever adapter is in it, in float64 on the CPU.

    It is read off the layer's outputs for the unit vectors, less that for zero.
    """
    twin = deepcopy(layer).cpu().double().eval()
    units = torch.eye(in_features, dtype=torch.float64)
    return (twin(units) - twin(torch.zeros_like(units[:1]))).T


def _directions(statistics: LayerStatistics, module: nn.Module, count: int, which: Which) -> Tensor:
    moments = statistics.moments
    if statistics.side == "input":
        weight: Any = weight_of(module)  # type: ignore[arg-type]
        return output_eigenpairs(weight, moments, module.bias, count=count, which=which).vectors  # type: ignore[arg-type]
    return range_eigenpairs(moments.gram, count, which, rank_bound=moments.count).vectors


def _measured(layer: nn.Module, original: _Original, step: int) -> Measurement:
    ref, weight = original.ref, original.weight.double()
    update = weight_now(layer, ref.in_features) - weight
    energy = float(update.square().sum())
    top, tail = (
        float((side.double().T @ update).square().sum()) / energy if energy else 0.0
        for side in (original.top, original.tail)
    )
    norm, chance = energy**0.5 / float(weight.norm()), original.top.shape[1] / ref.out_features
    return Measurement(step, ref.name, ref.role, ref.block, norm, top, tail, chance)
