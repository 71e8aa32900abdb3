"""The stages of a classification task: an adapter is fine-tuned and judged."""

import json
import logging
import shutil
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import DataCollatorWithPadding, EvalPrediction, set_seed

from lowrank_kit.calibration.collect import Kept
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import ClassificationTask, Metric
from lowrank_kit.data.task_rows import EvaluationRows, TaskRows
from lowrank_kit.evaluation import glue
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.methods.base import Adapter, InitialisedAdapter, Plan
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import (
    LoadedModel,
    fingerprint,
    load_model,
    local_path,
)
from lowrank_kit.progress import StageProgress
from lowrank_kit.stages.base import VERSIONS, Stages
from lowrank_kit.training.adapters import AdaptedModel, attach
from lowrank_kit.training.fit import fit
from lowrank_kit.training.initialise import calibrate_for, starting_factors

log = logging.getLogger(__name__)


class ClassificationStages(Stages[ClassificationTask, TaskRows]):
    """See `Stages`."""

    def calibrate(self) -> None:
        """Collect the statistics that the method needs, if any; they go to the content-keyed cache."""
        _ = self._kept

    def plan(self) -> None:
        """Decide the rank of every matrix: ``plan.json``."""
        if self._plan is not None:
            self._run.write_json("plan.json", asdict(self._plan))

    def apply(self) -> None:
        """Put the adapter into the model."""
        _ = self._adapted

    def train(self) -> None:
        """Fine-tune; ``adapter/`` is plain PEFT on the original base, ``history.json`` the Trainer's log."""
        adapted = self._adapted
        if adapted is None:
            return
        # Of an untrained model, should one have been judged before.
        self._run.forget("evaluate", "results.json")
        train, folder = self._data.train(self._tokenizer), self._run.path / "checkpoints"
        log.info("training %s parameters on %d rows", f"{adapted.trained_parameters:,}", len(train))
        self._manifest.record("trained_parameters", adapted.trained_parameters)
        history = fit(
            adapted.model,
            train,
            self.config.train,
            collate=DataCollatorWithPadding(self._tokenizer),
            folder=folder,
            device=self.device,
            seed=self.config.seed,
            log=self._tracker.log,
            evaluation=self._evaluation[0].rows,
            eval_batch_size=self.config.eval.batch_size,
            score=self._score,
        )
        self._run.write_json("history.json", history)
        with self._run.write_folder("adapter") as adapter:
            adapted.export(adapter, local_path(self._model_source))
        shutil.rmtree(folder, ignore_errors=True)

    def evaluate(self) -> None:
        """Measure the final model on every evaluation split: ``results.json``."""
        model, records = self._final_model, []
        guess = glue.majority(self._data.train_labels, self.task.labels == 1)
        for rows in self._evaluation:
            labels = np.array(rows.rows["labels"])
            logits = glue.predict(model, rows.rows, self._tokenizer, self.config.eval.batch_size, self.device)
            predictions = glue.predictions_of(logits)
            constant = np.full(len(labels), guess)
            for metric in self.task.metrics:
                error = glue.standard_error(metric, labels, predictions)
                reference = glue.score(metric, labels, constant)
                value = glue.score(metric, labels, predictions)
                records.append(self._record(rows, metric, reference, "majority_class"))
                records.append(self._record(rows, metric, value, "final", stderr=error))
        records += self._looks_while_training(self._evaluation[0])
        self._run.write_json("results.json", [asdict(record) for record in records])

    @cached_property
    def _loaded(self) -> LoadedModel:
        set_seed(self.config.seed)
        loaded = load_model(
            self._model_source,
            "classification",
            getattr(torch, self.config.dtype),
            self.device,
            num_labels=self.task.labels,
            problem_type="regression" if self.task.labels == 1 else "single_label_classification",
        )
        facts = {**self.config.model.model_dump(), "fingerprint": fingerprint(loaded.model, layout_of(loaded.model))}
        self._manifest.record("model", facts)
        return loaded

    @cached_property
    def _evaluation(self) -> list[EvaluationRows]:
        return self._data.evaluation(self._tokenizer)

    @cached_property
    def _kept(self) -> dict[str, Kept]:
        method = self.method
        if not isinstance(method, InitialisedAdapter) or method.needs() is None:
            return {}
        samples = self._calibration_samples()
        self._manifest.record("calibration", {"samples": len(samples.sequences), "tokens": samples.tokens})
        with StageProgress() as progress:
            return calibrate_for(
                method,
                self._loaded.model,
                samples,
                batch_size=self.config.calibration.batch_size,
                cache=self._cache,
                progress=progress,
            )

    @cached_property
    def _plan(self) -> Plan | None:
        if not isinstance(self.method, Adapter):
            return None
        return self.method.plan(layout_of(self._loaded.model), self._kept)

    @cached_property
    def _adapted(self) -> AdaptedModel | None:
        method, plan = self.method, self._plan
        if not isinstance(method, Adapter) or plan is None:
            return None
        model = self._loaded.model
        factors = starting_factors(method, model, plan, self._kept)
        set_seed(self.config.seed)
        return attach(model, method, plan, factors, self._loaded.new_modules, task_type="SEQ_CLS")

    @property
    def _final_model(self) -> nn.Module:
        """The model to judge: trained here, or what an earlier process left in ``adapter/``."""
        if "_adapted" not in vars(self) and self._run.done("train") and isinstance(self.method, Adapter):
            return PeftModel.from_pretrained(self._loaded.model, str(self._run.path / "adapter"))
        if isinstance(self.method, Adapter) and not self._run.done("train"):
            log.warning("%s: evaluating the adapter as it starts: it was not trained", self.task.name)
        return self._adapted.model if self._adapted else self._loaded.model

    def _calibration_samples(self) -> CalibrationSamples:
        rows = self._data.calibration(self._tokenizer).remove_columns("labels")
        return CalibrationSamples(tuple({k: torch.tensor(v) for k, v in row.items()} for row in rows))

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = glue.predictions_of(np.asarray(prediction.predictions))
        labels = np.asarray(prediction.label_ids)
        return {metric: glue.score(metric, labels, predictions) for metric in self.task.metrics}

    def _record(
        self,
        rows: EvaluationRows,
        metric: Metric,
        value: float,
        checkpoint: Checkpoint,
        stderr: float | None = None,
        step: int | None = None,
    ) -> EvalRecord:
        return EvalRecord(rows.name, metric, value, stderr, len(rows.rows), 0, rows.source, VERSIONS, checkpoint, step)

    def _looks_while_training(self, rows: EvaluationRows) -> list[EvalRecord]:
        """The first and the best of the evaluations that the training log holds."""
        file = self._run.path / "history.json"
        history = json.loads(file.read_text()) if file.is_file() else []
        looks = [entry for entry in history if f"eval_{self.task.metrics[0]}" in entry]
        if not looks:
            return []
        states: dict[Checkpoint, dict[str, float]] = {
            "early": looks[0],
            "best": max(looks, key=lambda entry: entry[f"eval_{self.task.metrics[0]}"]),
        }
        return [
            self._record(rows, metric, look[f"eval_{metric}"], checkpoint, step=int(look["step"]))
            for checkpoint, look in states.items()
            for metric in self.task.metrics
        ]
