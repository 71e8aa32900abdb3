"""The stages of a causal model that learns a task's instructions and is evaluated before and after."""

from dataclasses import asdict
from functools import cached_property

import datasets
from torch import nn

from lowrank_kit.config import CausalTask
from lowrank_kit.data.causal import CausalData
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.task_instructions import TaskInstructions
from lowrank_kit.evaluation.answers import answer_perplexity
from lowrank_kit.evaluation.examples import ask
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.provenance import VERSIONS
from lowrank_kit.stages.causal_evaluation import CausalEvaluator
from lowrank_kit.stages.fine_tuning import FineTuningStages
from lowrank_kit.stages.models import Opened
from lowrank_kit.stages.training_effects import Inputs, windows_or_rows
from lowrank_kit.training.adapters import unwrapped
from lowrank_kit.training.fit import Examples


class CausalFineTuningStages(FineTuningStages[CausalTask, CausalData]):
    """See `FineTuningStages`. What was saved is evaluated beside the model as it came."""

    task_type = "CAUSAL_LM"

    def evaluate(self) -> list[EvalRecord]:
        """Measure the model as it came and the final one: ``results.json``; `effects.json`, what changed in it."""
        self.read_data()
        evaluator, effects = self._evaluator, self.config.eval.effects
        records: list[EvalRecord] = []
        with self.original() as original, StageProgress() as progress:
            dense = original.model
            layout = layout_of(dense)
            records += evaluator.evaluate(dense, layout, "dense", progress, as_it_came=True)
            records += self._on_held_out(dense, "dense")
            drift_of = self.effects.drift_of(dense, self._compared, self.models.device) if effects.enabled else None
            model = unwrapped(self.final(original))
            records += evaluator.evaluate(model, layout, "final", progress)
            records += self._on_held_out(model, "final")
            if drift_of:
                compared = f"{len(self._compared)} windows"
                self.effects.write(drift_of(model), compared, records, self.place.initialisation)
        self.place.run.write_json("results.json", [asdict(record) for record in records])
        return records

    def read(self) -> LoadedModel:
        """Read the original."""
        return self.models.causal()

    def read_data(self) -> None:
        """Cut the windows, prepare the benchmarks, encode what is learnt."""
        self._evaluator.check()
        _ = self._examples

    def calibration_rows(self, original: Opened) -> datasets.Dataset:
        """The first rows that are learnt, or windows of the text."""
        if self.config.calibration.on == "text":
            return datasets.Dataset.from_dict({"input_ids": self.data.texts.calibration(self.models.reader).tolist()})
        return self._instructions.calibration(self.models.reader, self.config.calibration, ask)

    @property
    def calibration_opening(self) -> int:
        """BOS."""
        return len(self.data.texts.opening("calibration", self.models.reader))

    def examples(self, original: Opened) -> Examples:
        """The instructions, and those held out."""
        return self._examples

    @cached_property
    def _examples(self) -> Examples:
        return Examples(
            self._instructions.train(self.models.reader, ask),
            RightPadded(padding_id(self.models.tokenizer, self.models.configuration)),
            self._instructions.held_out(self.models.reader, ask),
            eval_batch_size=self.config.train.batch_size,
        )

    @cached_property
    def _evaluator(self) -> CausalEvaluator:
        return CausalEvaluator(self.task, self.data.texts, self.config.eval, self.models, self.place)

    @property
    def _instructions(self) -> TaskInstructions:
        assert self.data.texts.instructions is not None
        return self.data.texts.instructions

    @property
    def _compared(self) -> Inputs:
        """Inputs on which hidden states are compared."""
        examples = self._examples
        return windows_or_rows(
            self._evaluator.texts, examples.evaluation or examples.rows, self.config.eval.effects.rows
        )

    def _on_held_out(self, model: nn.Module, checkpoint: Checkpoint) -> list[EvalRecord]:
        examples = self._examples
        rows = examples.evaluation
        if rows is None:
            return []
        found = answer_perplexity(model, rows, examples.collate, examples.eval_batch_size, self.models.device)
        opening = self.data.texts.opening("eval", self.models.reader)
        sets = ", ".join(self._instructions.sets)
        source = f"held out of training; {sets}, answers of {len(rows)} rows, {opening}"
        return [
            EvalRecord(
                "answers", "perplexity", found.value, found.stderr, len(rows), 0, source, VERSIONS, checkpoint,
                bos=opening.token or "",
            )
        ]  # fmt: skip
