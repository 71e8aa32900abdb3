"""The stages of a causal model that learns a task's instructions and is judged before and after."""

from dataclasses import asdict
from functools import cached_property

import datasets
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lowrank_kit.config import CausalTask
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.task_instructions import TaskInstructions
from lowrank_kit.data.texts import TaskTexts
from lowrank_kit.evaluation.answers import answer_perplexity
from lowrank_kit.evaluation.examples import ask
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel, load_model
from lowrank_kit.progress import StageProgress
from lowrank_kit.stages.base import VERSIONS
from lowrank_kit.stages.effects import Inputs, windows_or_rows
from lowrank_kit.stages.fine_tuning import FineTuningStages
from lowrank_kit.stages.judging import CausalJudge
from lowrank_kit.training.fit import Examples


class InstructionStages(FineTuningStages[CausalTask, TaskTexts]):
    """See `FineTuningStages`. What is judged is what was saved, beside the model as it came."""

    task_type = "CAUSAL_LM"

    def evaluate(self) -> None:
        """Measure the model as it came and the final one: ``results.json``; `effects.json`, what changed in it."""
        # Whatever is wrong with the data is found out before a model is loaded.
        self._read_data()
        records: list[EvalRecord] = []
        with StageProgress() as progress:
            original, effects = self._original(), self.config.eval.effects
            layout = layout_of(original)
            records += self._judge.judge(original, layout, "dense", progress, as_it_came=True)
            records += self._on_held_out(original, "dense")
            drift_of = self._effects.drift_of(original, self._compared, self.device) if effects.enabled else None
            trained = self._final_model()
            # PEFT has put its layers into the model itself.
            model = trained.get_base_model() if isinstance(trained, PeftModel) else trained
            assert isinstance(model, PreTrainedModel)
            records += self._judge.judge(model, layout, "final", progress)
            records += self._on_held_out(model, "final")
        if drift_of:
            self._effects.write(drift_of(model), f"{len(self._compared)} windows", records, self._initialisation)
        self._run.write_json("results.json", [asdict(record) for record in records])

    def _load(self) -> LoadedModel:
        return load_model(
            self._model_source,
            "causal",
            getattr(torch, self.config.dtype),
            self.device,
            quantization=self.config.model.quantization,
        )

    def _read_data(self) -> None:
        _ = self._judge.texts, self._judge.suite, self._examples()

    @cached_property
    def _judge(self) -> CausalJudge:
        self._manifest.record("bos", self._data.openings(self._tokenizer))
        return CausalJudge(self.config, self.task, self._data, self._tokenizer, self._run.path, self.device)

    def _calibration_rows(self) -> datasets.Dataset:
        return self._set.calibration(self._tokenizer, ask)

    @property
    def _calibration_opening(self) -> int:
        return len(self._data.opening("calibration", self._tokenizer))

    @property
    def _set(self) -> TaskInstructions:
        assert self._data.instructions is not None
        return self._data.instructions

    def _examples(self) -> Examples:
        return Examples(self._train_rows, self._collate, self._held_out, eval_batch_size=self.config.train.batch_size)

    @cached_property
    def _train_rows(self) -> datasets.Dataset:
        return self._set.train(self._tokenizer, ask)

    @cached_property
    def _held_out(self) -> datasets.Dataset | None:
        return self._set.held_out(self._tokenizer, ask)

    @cached_property
    def _collate(self) -> RightPadded:
        return RightPadded(padding_id(self._tokenizer, self._model_config))

    @property
    def _compared(self) -> Inputs:
        """Inputs on which hidden states are compared."""
        return windows_or_rows(self._judge.texts, self._held_out or self._train_rows, self.config.eval.effects.rows)

    def _on_held_out(self, model: nn.Module, checkpoint: Checkpoint) -> list[EvalRecord]:
        rows = self._held_out
        if rows is None:
            return []
        found = answer_perplexity(model, rows, self._collate, self.config.train.batch_size, self.device)
        opening = self._data.opening("eval", self._tokenizer)
        source = f"held out of training; {', '.join(self._set.sets)}, answers of {len(rows)} rows, {opening}"
        return [
            EvalRecord(
                "answers", "perplexity", found.value, found.stderr, len(rows), 0, source, VERSIONS, checkpoint,
                bos=opening.token or "",
            )
        ]  # fmt: skip
