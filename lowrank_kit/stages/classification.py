"""The stages of a classification task: an adapter is fine-tuned and judged."""

from dataclasses import asdict
from functools import cached_property
from itertools import chain

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from lowrank_kit.adapters.base import FineTuning
from lowrank_kit.config import ClassificationTask, Metric
from lowrank_kit.data.labels import LabelOrder, label_order, name_classes
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.special_tokens import put_before
from lowrank_kit.data.task_rows import EvaluationRows, TaskRows
from lowrank_kit.evaluation import glue
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.files import read_json
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel, load_model
from lowrank_kit.stages.base import VERSIONS
from lowrank_kit.stages.fine_tuning import FineTuningStages
from lowrank_kit.training.fit import Examples


class ClassificationStages(FineTuningStages[ClassificationTask, TaskRows]):
    """See `FineTuningStages`."""

    task_type = "SEQ_CLS"

    def evaluate(self) -> None:
        """Measure the final model on every evaluation split: ``results.json``."""
        effects = self.config.eval.effects.enabled and isinstance(self.method, FineTuning)
        drift_of = self._effects.drift_of(self._original(), self._compared, self.device) if effects else None
        model, records = self._final_model(), []
        guess = glue.majority(self._data.train_labels, self.task.labels == 1)
        for rows in self._evaluation:
            labels = np.array(rows.rows["labels"])
            logits = glue.predict(model, rows.rows, self._tokenizer, self.config.eval.batch_size, self.device)
            predictions = glue.predictions_of(self._order.logits(logits))
            constant = np.full(len(labels), guess)
            for metric in self.task.metrics:
                error = glue.standard_error(metric, labels, predictions)
                reference = glue.score(metric, labels, constant)
                value = glue.score(metric, labels, predictions)
                records.append(self._record(rows, metric, reference, "majority_class"))
                records.append(self._record(rows, metric, value, "final", stderr=error))
        records += self._looks_while_training(self._evaluation[0])
        if drift_of:
            self._effects.write(drift_of(model), f"{len(self._compared)} rows", records, self._initialisation)
        self._run.write_json("results.json", [asdict(record) for record in records])

    def _load(self) -> LoadedModel:
        loaded = load_model(
            self._model_source,
            "classification",
            getattr(torch, self.config.dtype),
            self.device,
            num_labels=self.task.labels,
            problem_type="regression" if self.task.labels == 1 else "single_label_classification",
            quantization=self.config.model.quantization,
        )
        # A decoder classifies at the last token that is no padding, and tells padding by this id alone.
        for config in (loaded.model.config, loaded.model.config.get_text_config()):
            config.pad_token_id = self._pad_token_id
        if layout_of(loaded.model).head in loaded.new_modules:
            name_classes(loaded.model.config, self.task)
        return loaded

    @cached_property
    def _order(self) -> LabelOrder:
        return label_order(self._loaded.model.config, self.task)

    def _read_data(self) -> None:
        _ = self._pad_token_id

    @cached_property
    def _pad_token_id(self) -> int:
        judged = (ids for rows in self._evaluation for ids in rows.rows["input_ids"])
        return padding_id(self._tokenizer, self._model_config, chain(judged, self._learnt["input_ids"]))

    @cached_property
    def _learnt(self) -> datasets.Dataset:
        return self._data.train(self._tokenizer)

    @cached_property
    def _evaluation(self) -> list[EvaluationRows]:
        return self._data.evaluation(self._tokenizer)

    def _calibration_rows(self) -> datasets.Dataset:
        return self._order.for_model(self._data.calibration(self._tokenizer))

    @property
    def _calibration_opening(self) -> int:
        """BOS is not calibrated on; an encoder's CLS, which it may classify at, is."""
        begun = put_before(self._tokenizer)
        return int(begun is not None and begun != self._tokenizer.cls_token_id)

    def _examples(self) -> Examples:
        return Examples(
            self._order.for_model(self._learnt),
            RightPadded(self._pad_token_id),
            self._order.for_model(self._evaluation[0].rows),
            self._score,
            self.config.eval.batch_size,
        )

    @property
    def _compared(self) -> list[dict[str, Tensor]]:
        """Inputs on which hidden states are compared: the first rows to judge on."""
        rows = self._evaluation[0].rows.remove_columns("labels")
        count = min(self.config.eval.effects.rows, len(rows))
        return [{name: torch.tensor(value) for name, value in rows[i].items()} for i in range(count)]

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = glue.predictions_of(self._order.logits(np.asarray(prediction.predictions)))
        labels = self._order.for_task(np.asarray(prediction.label_ids))
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
        history = read_json(self._run.path / "history.json", list) or []
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
