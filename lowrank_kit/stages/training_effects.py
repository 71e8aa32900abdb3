"""What a training does to a model, as every run that trains reports it: ``effects.json`` and its plots."""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import EffectsConfig
from lowrank_kit.data.task_texts import EvaluationText
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.plots.effects import Share, plot_drift, plot_energy
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.training.adapters import unwrapped
from lowrank_kit.training.drift import drift, hidden_states
from lowrank_kit.training.update_energy import EnergyLog, Measurement, UpdateEnergy, sampled

EFFECTS_FILE, ENERGY_FILE = "effects.json", "energy.json"

Inputs = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Effects:
    """The effects of one run's training, which are kept in its directory."""

    run: RunDirectory
    settings: EffectsConfig

    def energy(
        self,
        model: PreTrainedModel,
        targets: Sequence[LinearRef],
        ranks: Mapping[str, int],
        samples: CalibrationSamples,
        cache: Path | None,
    ) -> UpdateEnergy:
        """What measures the update of some ``targets`` while they learn; ``model`` is still without adapter."""
        refs = sampled(targets, self.settings.blocks)
        few = samples.first(self.settings.samples)
        return UpdateEnergy.of(model, refs, ranks, few, self._log, cache)

    def drift_of(self, original: PreTrainedModel, rows: Inputs, device: str) -> Callable[[nn.Module], list[float]]:
        """Remember the original's hidden states on these inputs; the outcome tells how far another model's are."""
        names = layout_of(original).blocks
        inputs = [{name: values[None].to(device) for name, values in row.items()} for row in rows]
        before = hidden_states(original, [original.get_submodule(name) for name in names], inputs)

        def measure(model: nn.Module) -> list[float]:
            base = unwrapped(model)
            return drift(before, hidden_states(model, [base.get_submodule(name) for name in names], inputs))

        return measure

    def write(
        self,
        moved: Sequence[float],
        rows: str,
        records: Sequence[EvalRecord],
        initialisation: Mapping[str, Any],
        before: Checkpoint = "dense",
    ) -> None:
        """Write ``effects.json`` and plots; ``rows`` says on what hidden states were compared, with ``before``'s."""
        measured = self._log.read()
        figures = {(r.task, r.metric, r.checkpoint): r for r in records}
        forgetting = [
            {"text": task, "before": old.value, "after": new.value, "nats": math.log(new.value / old.value)}
            for (task, metric, checkpoint), old in figures.items()
            if metric == "perplexity" and checkpoint == before and (new := figures.get((task, metric, "final")))
        ]
        self.run.write_json(
            EFFECTS_FILE,
            {
                "forgetting": forgetting,
                "drift": {"by_block": list(moved), "on": rows},
                "energy": [asdict(one) for one in measured],
                "initialisation": initialisation,
            },
        )
        there = self.run.path / "plots"
        with self.run.write_folder("plots") as plots:
            if there.is_dir():
                # Of a plan.
                shutil.copytree(there, plots, dirs_exist_ok=True)
            plot_drift(moved, plots / "drift.png")
            if measured:
                plot_energy(_shares(measured), plots / "energy.png")

    @property
    def _log(self) -> EnergyLog:
        return EnergyLog(self.run.path / ENERGY_FILE, self.settings.measurements)


def windows_or_rows(texts: Sequence[EvaluationText], rows: datasets.Dataset, count: int) -> Inputs:
    """The first windows of the first text, or where there is none the first rows that are learnt."""
    if texts:
        return [{"input_ids": window} for window in texts[0].windows[:count]]
    return [{"input_ids": torch.tensor(ids)} for ids in rows[:count]["input_ids"]]


def _shares(measured: Sequence[Measurement]) -> dict[str, list[Share]]:
    """The mean over the linears of a role, step by step."""
    groups: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for one in measured:
        groups[one.role, one.step].append(one)
    shares: dict[str, list[Share]] = defaultdict(list)
    for (role, step), found in groups.items():
        top, tail, chance = (fmean(getattr(one, name) for one in found) for name in ("top", "tail", "chance"))
        shares[role].append(Share(step, top, tail, chance))
    return shares
