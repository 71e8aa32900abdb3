"""The stages of a classification task: an adapter is fine-tuned and evaluated."""

from dataclasses import asdict
from functools import cached_property
from itertools import chain

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from lowrank_kit.config import ClassificationTask, Metric
from lowrank_kit.data.labels import label_order, name_classes
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.special_tokens import put_before
from lowrank_kit.data.task_rows import EvaluationRows, TaskRows
from lowrank_kit.evaluation import glue
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.files import read_json
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel
from lowrank_kit.runs.provenance import VERSIONS
from lowrank_kit.stages.fine_tuning import FineTuningStages
from lowrank_kit.stages.models import Opened
from lowrank_kit.training.fit import Examples


class ClassificationStages(FineTuningStages[ClassificationTask, TaskRows]):
    """See `FineTuningStages`."""

    task_type = "SEQ_CLS"

    def evaluate(self) -> list[EvalRecord]:
        """Measure the final model on every evaluation split: ``results.json``; `effects.json`, what changed in it."""
        settings, device = self.config.eval, self.models.device
        guess = glue.majority(self.data.train_labels, self.task.labels == 1)
        records, drift_of = [], None
        with self.original() as original:
            order = label_order(original.model.config, self.task)
            if settings.effects.enabled and self.config.method.trains:
                drift_of = self.effects.drift_of(original.model, self._compared, device)
            model = self.final(original)
            for rows in self._evaluation:
                labels = np.array(rows.rows["labels"])
                logits = glue.predict(model, rows.rows, self.models.tokenizer, settings.batch_size, device)
                predictions = glue.predictions_of(order.logits(logits))
                constant = np.full(len(labels), guess)
                for metric in self.task.metrics:
                    error = glue.standard_error(metric, labels, predictions)
                    reference = glue.score(metric, labels, constant)
                    value = glue.score(metric, labels, predictions)
                    records.append(_record(rows, metric, reference, "majority_class"))
                    records.append(_record(rows, metric, value, "final", stderr=error))
            records += self._while_training(self._evaluation[0])
            if drift_of:
                compared = f"{len(self._compared)} rows"
                self.effects.write(drift_of(model), compared, records, self.place.initialisation)
        self.place.run.write_json("results.json", [asdict(record) for record in records])
        return records

    def read(self) -> LoadedModel:
        """Read the original with the task's number of labels, and name a new head's."""
        found = self.models.classifier(self.task.labels)
        # A decoder classifies at the last token that is no padding, and tells padding by this id alone.
        for config in (found.model.config, found.model.config.get_text_config()):
            config.pad_token_id = self._pad_token_id
        if layout_of(found.model).head in found.new_modules:
            name_classes(found.model.config, self.task)
        return found

    def read_data(self) -> None:
        """Encode the rows, and find what pads them."""
        _ = self._pad_token_id

    @cached_property
    def _pad_token_id(self) -> int:
        evaluated = (ids for rows in self._evaluation for ids in rows.rows["input_ids"])
        return padding_id(self.models.tokenizer, self.models.configuration, chain(evaluated, self._learnt["input_ids"]))

    @cached_property
    def _learnt(self) -> datasets.Dataset:
        return self.data.train(self.models.reader)

    @cached_property
    def _evaluation(self) -> list[EvaluationRows]:
        return self.data.evaluation(self.models.reader)

    def calibration_rows(self, original: Opened) -> datasets.Dataset:
        """The first training rows."""
        order = label_order(original.model.config, self.task)
        return order.for_model(self.data.calibration(self.models.reader))

    @property
    def calibration_opening(self) -> int:
        """BOS is not calibrated on; an encoder's CLS, which it may classify at, is."""
        begun = put_before(self.models.tokenizer)
        return int(begun is not None and begun != self.models.tokenizer.cls_token_id)

    def examples(self, original: Opened) -> Examples:
        """The training rows, and the first evaluation split."""
        order = label_order(original.model.config, self.task)

        def score(prediction: EvalPrediction) -> dict[str, float]:
            predictions = glue.predictions_of(order.logits(np.asarray(prediction.predictions)))
            labels = order.for_task(np.asarray(prediction.label_ids))
            return {metric: glue.score(metric, labels, predictions) for metric in self.task.metrics}

        return Examples(
            order.for_model(self._learnt),
            RightPadded(self._pad_token_id),
            order.for_model(self._evaluation[0].rows),
            score,
            self.config.eval.batch_size,
        )

    @property
    def _compared(self) -> list[dict[str, Tensor]]:
        """Inputs on which hidden states are compared: the first rows to evaluate on."""
        rows = self._evaluation[0].rows.remove_columns("labels")
        count = min(self.config.eval.effects.rows, len(rows))
        return [{name: torch.tensor(value) for name, value in rows[i].items()} for i in range(count)]

    def _while_training(self, rows: EvaluationRows) -> list[EvalRecord]:
        """The first and the best of the evaluations that the training log holds."""
        history = read_json(self.place.path / "history.json", list) or []
        evaluations = [entry for entry in history if f"eval_{self.task.metrics[0]}" in entry]
        if not evaluations:
            return []
        states: dict[Checkpoint, dict[str, float]] = {
            "early": evaluations[0],
            "best": max(evaluations, key=lambda entry: entry[f"eval_{self.task.metrics[0]}"]),
        }
        return [
            _record(rows, metric, found[f"eval_{metric}"], checkpoint, step=int(found["step"]))
            for checkpoint, found in states.items()
            for metric in self.task.metrics
        ]


def _record(
    rows: EvaluationRows,
    metric: Metric,
    value: float,
    checkpoint: Checkpoint,
    stderr: float | None = None,
    step: int | None = None,
) -> EvalRecord:
    return EvalRecord(rows.name, metric, value, stderr, len(rows.rows), 0, rows.source, VERSIONS, checkpoint, step)
