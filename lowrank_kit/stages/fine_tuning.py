"""What every run that trains shares, an adapter or the whole model: all but its data, its head and its evaluation."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Generic, TypeVar, cast

import datasets
import torch
from torch import nn
from transformers import set_seed

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.adapter import FineTuning
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import RunConfig
from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel, local_path
from lowrank_kit.plan import Plan
from lowrank_kit.progress import StageProgress
from lowrank_kit.stages.ledger import Ledger
from lowrank_kit.stages.models import Models, Opened, loaded
from lowrank_kit.stages.training_effects import EFFECTS_FILE, Effects
from lowrank_kit.stages.workplace import Workplace
from lowrank_kit.training.adapters import Adapted, load_adapted
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapted, calibrate_for
from lowrank_kit.training.update_energy import UpdateEnergy

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Data = TypeVar("Data")


@dataclass(frozen=True)
class Start:
    """A model that is ready to train, and what measures its update while it does; None: nothing."""

    ready: Adapted
    energy: UpdateEnergy | None


class FineTuningStages(ABC, Generic[Task, Data]):
    """One task's run of a method that trains, or of none: then the model is evaluated as it is.

    ``adapter/`` is plain PEFT on the original base; full fine-tuning leaves ``checkpoint/`` instead. What is evaluated
    is what was saved there.
    """

    task_type: ClassVar[str]
    """PEFT's name of the kind of model."""

    def __init__(self, config: RunConfig, task: Task, data: Data, models: Models, place: Workplace) -> None:
        self.config, self.task, self.data, self.models, self.place = config, task, data, models, place
        self.effects = Effects(place.run, config.eval.effects)

    @property
    def method(self) -> FineTuning:
        """The method, where it trains."""
        return cast(FineTuning, self.config.method)

    def run(self, ledger: Ledger) -> None:
        """Do the stages that are to be done."""
        if self.config.method.trains:
            self._train(ledger)
        else:
            for stage in ("calibrate", "plan", "apply", "train"):
                ledger.do(stage, self.read_data)
        ledger.do("evaluate", self.evaluate)

    def _train(self, ledger: Ledger) -> None:
        # Each is made once, by the first stage that needs it.
        with self.original() as original:
            statistics = cache(lambda: self.calibrate(original))
            plan = cache(lambda: self.plan(original, statistics()))
            start = cache(lambda: self.apply(original, plan(), statistics()))
            ledger.do("calibrate", statistics)
            ledger.do("plan", plan)
            ledger.do("apply", start)
            ledger.do("train", lambda: self.train(original, start()))

    @abstractmethod
    def read(self) -> LoadedModel:
        """Read the original model."""

    @abstractmethod
    def read_data(self) -> None:
        """Find out what is wrong with the data, before a model is loaded."""

    @abstractmethod
    def calibration_rows(self, original: Opened) -> datasets.Dataset:
        """The training rows to calibrate on, encoded as in training."""

    @property
    @abstractmethod
    def calibration_opening(self) -> int:
        """Tokens at the beginning of those rows that are not calibrated on."""

    @abstractmethod
    def examples(self, original: Opened) -> Examples:
        """What is learnt."""

    @abstractmethod
    def evaluate(self) -> list[EvalRecord]:
        """Measure the final model: ``results.json``."""

    def calibrate(self, original: Opened) -> dict[str, Kept]:
        """Collect what the method needs to know of every target, if anything; it is in the content-keyed cache."""
        self.read_data()
        if not self.method.calibrates:
            return {}
        model, samples = original.model, self._samples(original)
        with self.place.timing("calibrate"), StageProgress() as progress:
            return calibrate_for(self.method, model, samples, cache=self.place.cache, progress=progress)

    def plan(self, original: Opened, statistics: Mapping[str, Kept]) -> Plan:
        """Decide the rank of every matrix: ``plan.json``."""
        plan = self.method.plan(layout_of(original.model), statistics)
        self.place.run.write_json("plan.json", plan.as_json())
        return plan

    def apply(self, original: Opened, plan: Plan, statistics: Mapping[str, Kept]) -> Start:
        """Put the adapter into the model."""
        # The original's activations and weights, which the adapter may change.
        energy = self._energy(original, plan)
        samples = self._samples(original) if self.method.calibrates else None
        with self.place.timing("start"):
            set_seed(self.config.seed)
            ready = adapted(
                self.method,
                original.model,
                plan,
                statistics,
                samples,
                new_modules=original.loaded.new_modules,
                task_type=self.task_type,
            )
        return Start(ready, energy)

    def train(self, original: Opened, start: Start) -> Path:
        """Fine-tune; return what `export` wrote.

        ``history.json`` is the Trainer's log, ``energy.json`` what `UpdateEnergy` measured.
        """
        run, folder, ready = self.place.run, self.place.path / "checkpoints", start.ready
        # Of an untrained model, should one have been evaluated before.
        run.forget("evaluate", "results.json", EFFECTS_FILE)
        examples = self.examples(original)
        log.info("training %s parameters on %d rows", f"{ready.trained_parameters:,}", len(examples.rows))
        self.place.manifest.record("trained_parameters", ready.trained_parameters)
        history = fit(
            ready.model,
            examples,
            self.config.train,
            Session(folder, self.models.device, self.config.seed, self.place.tracker.log, self.config.runtime),
            optimizer=ready.optimizer,
            callbacks=[start.energy] if start.energy and launcher.is_main() else [],
        )
        run.write_json("history.json", history)
        distributed.on_main(lambda: self._export(ready))
        run.remove(folder.name)
        return self._exported

    def original(self) -> AbstractContextManager[Opened]:
        """The model as it came, for a `with` block."""
        return loaded(self._read_original)

    def final(self, original: Opened) -> nn.Module:
        """The model to evaluate: the original with what training has left on disk; untrained, as it starts."""
        if not self.config.method.trains:
            return original.model
        if self.place.run.done("train"):
            return load_adapted(self.method, original.model, self._exported)
        log.warning("%s: evaluating the adapter as it starts: it was not trained", self.config.task.name)
        statistics = self.calibrate(original)
        return self.apply(original, self.plan(original, statistics), statistics).ready.model

    @property
    def _exported(self) -> Path:
        return self.place.path / ("adapter" if self.method.adapts else "checkpoint")

    def _export(self, trained: Adapted) -> None:
        with self.place.run.write_folder(self._exported.name) as exported:
            trained.export(exported, local_path(self.models.source))
            if not self.method.adapts:
                self.models.tokenizer.save_pretrained(exported)

    def _read_original(self) -> LoadedModel:
        found = self.read()
        facts = {**self.config.model.model_dump(), "fingerprint": fingerprint(found.model, layout_of(found.model))}
        on_top = {"new_modules": list(found.new_modules), "left_out": list(found.left_out)}
        self.place.manifest.record("model", facts | on_top)
        return found

    def _samples(self, original: Opened) -> CalibrationSamples:
        rows = self.calibration_rows(original)
        sequences = tuple({k: torch.tensor(v) for k, v in row.items()} for row in rows)
        batch_size = self.config.calibration.batch_size
        samples = CalibrationSamples(sequences, self.calibration_opening, batch_size)
        self.place.manifest.record("calibration", {"samples": len(samples.sequences), "tokens": samples.tokens})
        return samples

    def _energy(self, original: Opened, plan: Plan) -> UpdateEnergy | None:
        """What measures the update, unless training is over."""
        if not self.config.eval.effects.enabled or self.place.run.done("train"):
            return None
        if self.config.runtime.shards or self.config.model.quantization != "none":
            log.info("where the update lies is not measured: weights are sharded or quantised while they learn")
            return None
        model = original.model
        targets = self.method.targets(layout_of(model))
        return self.effects.energy(model, targets, plan.ranks, self._samples(original), self.place.cache)
