"""What every run that trains shares, an adapter or the whole model: all but its data, its head and its judges."""

import logging
import time
from abc import abstractmethod
from functools import cached_property
from typing import ClassVar, Generic

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.base import Adapter, FineTuning
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.method import Plan
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel, local_path
from lowrank_kit.progress import StageProgress
from lowrank_kit.stages.base import Data, Stages, Task
from lowrank_kit.stages.effects import EFFECTS_FILE, Effects
from lowrank_kit.training.adapters import Adapted, load_adapted
from lowrank_kit.training.effects import UpdateEnergy
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapted, calibrate_for

log = logging.getLogger(__name__)


class FineTuningStages(Stages[Task, Data], Generic[Task, Data]):
    """See `Stages`; a method that trains nothing (none) is judged as it is."""

    # The model that is trained, sharded or not, is made ready in every process.
    shared = frozenset({"calibrate", "plan", "apply", "train", "evaluate"})

    task_type: ClassVar[str]
    """PEFT's name of the kind of model."""

    @abstractmethod
    def _load(self) -> LoadedModel:
        """The original model."""

    @abstractmethod
    def _read_data(self) -> None:
        """Find out what is wrong with the data, before a model is loaded."""

    @abstractmethod
    def _calibration_rows(self) -> datasets.Dataset:
        """The training rows to calibrate on, encoded as in training."""

    @property
    @abstractmethod
    def _calibration_opening(self) -> int:
        """Tokens at the beginning of those rows that are not calibrated on."""

    @abstractmethod
    def _examples(self) -> Examples:
        """What is learnt."""

    def calibrate(self) -> None:
        """Collect the statistics that the method needs, if any; they go to the content-keyed cache."""
        self._read_data()
        _ = self._kept

    def plan(self) -> None:
        """Decide the rank of every matrix: ``plan.json``."""
        if self._plan is not None:
            self._run.write_json("plan.json", self._plan.as_json())

    def apply(self) -> None:
        """Put the adapter into the model."""
        _ = self._adapted

    def train(self) -> None:
        """Fine-tune; ``adapter/`` is plain PEFT on the original base, ``history.json`` the Trainer's log.

        Full fine-tuning leaves ``checkpoint/`` instead. ``energy.json``: see `UpdateEnergy`.
        """
        if not isinstance(self.method, FineTuning):
            return
        # Of an untrained model, should one have been judged before.
        self._run.forget("evaluate", "results.json", EFFECTS_FILE)
        examples, folder, energy = self._examples(), self._run.path / "checkpoints", self._energy
        ready = self._adapted
        assert ready is not None
        log.info("training %s parameters on %d rows", f"{ready.trained_parameters:,}", len(examples.rows))
        self._manifest.record("trained_parameters", ready.trained_parameters)
        history = fit(
            ready.model,
            examples,
            self.config.train,
            Session(folder, self.device, self.config.seed, self._tracker.log, self.config.runtime),
            optimizer=ready.optimizer,
            callbacks=[energy] if energy and launcher.is_main() else [],
        )
        self._run.write_json("history.json", history)
        distributed.on_main(lambda: self._export(ready))
        self._run.remove(folder.name)

    def _export(self, trained: Adapted) -> None:
        with self._run.write_folder(self._export_name) as exported:
            trained.export(exported, local_path(self._model_source))
            if not isinstance(self.method, Adapter):
                self._tokenizer.save_pretrained(exported)

    @property
    def _export_name(self) -> str:
        return "adapter" if isinstance(self.method, Adapter) else "checkpoint"

    @cached_property
    def _loaded(self) -> LoadedModel:
        set_seed(self.config.seed)
        loaded = self._load()
        facts = {**self.config.model.model_dump(), "fingerprint": fingerprint(loaded.model, layout_of(loaded.model))}
        on_top = {"new_modules": list(loaded.new_modules), "left_out": list(loaded.left_out)}
        self._manifest.record("model", facts | on_top)
        return loaded

    @cached_property
    def _samples(self) -> CalibrationSamples:
        rows = self._calibration_rows()
        sequences = tuple({k: torch.tensor(v) for k, v in row.items()} for row in rows)
        samples = CalibrationSamples(sequences, self._calibration_opening)
        self._manifest.record("calibration", {"samples": len(samples.sequences), "tokens": samples.tokens})
        return samples

    @cached_property
    def _kept(self) -> dict[str, Kept]:
        method = self.method
        if not isinstance(method, FineTuning) or not method.calibrates:
            return {}
        model, samples, started = self._loaded.model, self._samples, time.perf_counter()
        with StageProgress() as progress:
            kept = calibrate_for(
                method,
                model,
                samples,
                batch_size=self.config.calibration.batch_size,
                cache=self._cache,
                progress=progress,
            )
        self._note("calibrate", started)
        return kept

    @cached_property
    def _plan(self) -> Plan | None:
        if not isinstance(self.method, FineTuning):
            return None
        return self.method.plan(layout_of(self._loaded.model), self._kept)

    @cached_property
    def _adapted(self) -> Adapted | None:
        method, plan = self.method, self._plan
        if not isinstance(method, FineTuning) or plan is None:
            return None
        # The original's activations and weights, which the adapter may change.
        _ = self._energy
        samples, started = self._samples if method.calibrates else None, time.perf_counter()
        set_seed(self.config.seed)
        ready = adapted(
            method,
            self._loaded.model,
            plan,
            self._kept,
            samples,
            new_modules=self._loaded.new_modules,
            task_type=self.task_type,
            batch_size=self.config.calibration.batch_size,
        )
        self._note("start", started)
        return ready

    @cached_property
    def _energy(self) -> UpdateEnergy | None:
        method, plan = self.method, self._plan
        if not isinstance(method, FineTuning) or plan is None or not self.config.eval.effects.enabled:
            return None
        # Afterwards there is nothing left to look at.
        if self._run.done("train"):
            return None
        if self.config.runtime.shards or self.config.model.quantization != "none":
            log.info("where the update lies is not looked at: weights are sharded or quantised while they learn")
            return None
        return self._effects.energy(
            self._loaded.model, method, plan.ranks, self._samples, self.config.calibration.batch_size, self._cache
        )

    @property
    def _effects(self) -> Effects:
        return Effects(self._run, self.config.eval.effects)

    def _original(self) -> PreTrainedModel:
        """The model as it came: loaded anew where an adapter has been put into it."""
        if "_adapted" in vars(self):
            for used in ("_loaded", "_adapted", "_energy"):
                vars(self).pop(used, None)
        return self._loaded.model

    def _final_model(self) -> nn.Module:
        """The model to judge: the original with what training has left on disk; untrained, as it starts."""
        method = self.method
        if not isinstance(method, FineTuning):
            return self._loaded.model
        if self._run.done("train"):
            return load_adapted(method, self._original(), self._run.path / self._export_name)
        log.warning("%s: evaluating the adapter as it starts: it was not trained", self.config.task.name)
        assert self._adapted is not None
        return self._adapted.model
