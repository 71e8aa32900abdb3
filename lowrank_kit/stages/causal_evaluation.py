"""What is measured on causal models: perplexity on texts, answers to benchmarks; the original's only once."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from lowrank_kit import distributed
from lowrank_kit.cache.figures import content_hash, shared_figures
from lowrank_kit.cache.key import StatisticsKey, tokenizer_fingerprint
from lowrank_kit.config import CausalTask, EvalConfig
from lowrank_kit.data.task_texts import EvaluationText, TaskTexts
from lowrank_kit.evaluation.perplexity import Perplexity, perplexity
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.directory import write_atomically
from lowrank_kit.runs.provenance import VERSIONS
from lowrank_kit.stages.models import Models
from lowrank_kit.stages.workplace import Workplace

if TYPE_CHECKING:
    from lowrank_kit.stages.suite import Suite


WINDOWS = "windows"
"""Folder below the run directory: ``windows/CHECKPOINT/TEXT.json`` has a text's mean loss (nats) window by window."""


class CausalEvaluator:
    """What a task measures on causal models: perplexity on texts and answers to benchmarks, the same for every model.

    Answers to benchmarks lie in the run directory; without caches, what the original answers is not shared. `texts` and
    `suite` read no weights and raise `ConfigError` for what cannot be measured; see `TaskTexts.evaluation` and
    `PreparedBenchmark`.
    """

    def __init__(
        self, task: CausalTask, data: TaskTexts, settings: EvalConfig, models: Models, place: Workplace
    ) -> None:
        self._task, self._data, self._settings, self._models, self._place = task, data, settings, models, place

    def check(self) -> None:
        """Find out what is wrong with the texts and benchmarks, before a model is loaded."""
        self._place.manifest.record("bos", self._data.openings(self._models.reader))
        _ = self.texts, self.suite

    @cached_property
    def texts(self) -> list[EvaluationText]:
        """The windows to evaluate on."""
        return self._data.evaluation(self._models.reader)

    @cached_property
    def suite(self) -> "Suite | None":
        """The benchmarks of the task."""
        if not self._data.benchmarks:
            return None
        # Imported only now: lm-eval takes seconds, and most tasks have no benchmarks.
        from lowrank_kit.evaluation.harness import PreparedBenchmark
        from lowrank_kit.stages.suite import Suite

        allowed = self._settings.allow_code_execution
        benchmarks = [PreparedBenchmark(questions, allowed) for questions in self._data.benchmarks.values()]
        reader, batch_size = self._models.reader, self._settings.batch_size
        opening = self._data.opening("eval", reader)
        return Suite(benchmarks, reader.tokenizer, batch_size, reader.longest, VERSIONS, self._place.path, opening)

    def evaluate(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        checkpoint: Checkpoint,
        progress: StageProgress,
        as_it_came: bool = False,
    ) -> list[EvalRecord]:
        """The records of one model; ``layout`` is its own, without adapters. ``as_it_came``: once for all runs."""
        cache = self._place.caches if as_it_came else None
        key = StatisticsKey.of(
            model, layout, reads="loss", text="", batch_size=self._task.batch_size, request={"quantity": "perplexity"}
        )
        figures = []
        for text in self.texts:
            measure = partial(self._measure, model, text, checkpoint, progress)
            if cache is None:
                found = measure()
            else:
                its_key = replace(key, text=content_hash(text.windows))
                found = _shared(cache / "perplexity", its_key, f"{checkpoint} perplexity", measure)
            figures.append(_record(text, found, checkpoint))
            distributed.on_main(partial(self._keep_windows, text, found, checkpoint))
        if self.suite is None:
            return figures
        generation = model.generation_config.to_dict() if model.can_generate() else {}
        asks = replace(
            key,
            batch_size=self.suite.batch_size,
            request={
                "quantity": "answers",
                "max_length": self.suite.max_length,
                "bos": self.suite.opening.ids,
                "generation": generation,
            },
            tokenizer=tokenizer_fingerprint(self._models.tokenizer),
        )
        shared = None if cache is None else cache / "benchmarks"
        return figures + self.suite.evaluate(model, checkpoint, asks, progress, shared)

    def _keep_windows(self, text: EvaluationText, found: Perplexity, checkpoint: Checkpoint) -> None:
        """The figure of every window: what a spread, or a comparison with another model's, is computed from."""
        kept = {
            "nll": found.per_window,
            "predicted_tokens": text.windows.shape[1] - 1,
            "bos": text.opening.facts(),
            "windows_sha256": content_hash(text.windows),
        }
        file = self._place.path / WINDOWS / checkpoint / f"{text.name}.json"
        write_atomically(file, json.dumps(kept) + "\n")

    def _measure(
        self, model: PreTrainedModel, text: EvaluationText, checkpoint: Checkpoint, progress: StageProgress
    ) -> Perplexity:
        description = f"{checkpoint} perplexity of {text.name}"
        return perplexity(model, text.windows, self._task.batch_size, self._models.device, progress, description)


def _shared(root: Path, key: StatisticsKey, what: str, measure: Callable[[], Perplexity]) -> Perplexity:
    """What ``measure`` gives, once for all runs that read the same windows with the same model."""
    found = shared_figures(root, key, what, lambda: asdict(measure()))
    return Perplexity(**{**found, "per_window": tuple(found["per_window"])})


def _record(text: EvaluationText, found: Perplexity, checkpoint: Checkpoint) -> EvalRecord:
    return EvalRecord(
        text.name, "perplexity", found.value, found.stderr, len(text.windows), 0, text.source, VERSIONS, checkpoint,
        bos=text.opening.token or "",
    )  # fmt: skip
