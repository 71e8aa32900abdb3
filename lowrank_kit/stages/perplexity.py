"""The stages of a perplexity task: a causal model is compressed, perhaps recovered, and judged beside the dense one."""

import gc
import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch
from transformers import PreTrainedModel, set_seed

from lowrank_kit.assets import cache_dir
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compression import at_work
from lowrank_kit.compression.base import Compression, Workbench
from lowrank_kit.config import PerplexityTask
from lowrank_kit.data.texts import EvaluationText, TaskTexts, Windows
from lowrank_kit.evaluation.perplexity import Perplexity, perplexity
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.evaluation.speed import measure_speed, speed_records
from lowrank_kit.methods.base import Compressor, Plan
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, fingerprint, load_model
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.directory import write_atomically
from lowrank_kit.stages.base import VERSIONS, Stages
from lowrank_kit.training.recover import recover

if TYPE_CHECKING:
    from lowrank_kit.stages.suite import Suite

log = logging.getLogger(__name__)


class PerplexityStages(Stages[PerplexityTask, TaskTexts]):
    """See `Stages`; ``checkpoint/`` is the compressed model, ``recovered/`` that one after its recovery.

    What is judged is what was saved there.
    """

    def calibrate(self) -> None:
        """Let the compressor look at the model; what it keeps goes to the content-keyed cache, for every ratio."""
        # Texts that are too short are found out before the model is loaded.
        self._data.evaluation(self._tokenizer)
        _ = self._suite
        if self._recovers:
            _ = self._recovery_rows
        if self._compressor is not None:
            _ = self._samples, self._probe_windows
            with StageProgress() as progress:
                self._compression.calibrate(progress)

    def plan(self) -> None:
        """Decide what is kept: ``plan.json``, with ``plots/``."""
        if self._compressor is None:
            return
        with StageProgress() as progress:
            plan = self._compression.plan(progress)
        self._run.write_json("plan.json", asdict(plan))
        with self._run.write_folder("plots") as plots:
            self._compression.plot(plan, plots)
        removed = 1 - plan.parameters_after / plan.parameters_before
        log.info("%.4f of the decoder-linear parameters removed, asked for: %g", removed, self._compressor.ratio)

    def apply(self) -> None:
        """Compress as planned: ``checkpoint/``, which plain transformers loads."""
        if self._compressor is None:
            return
        plan, dense = self._plan, _size(self._loaded)
        with StageProgress() as progress:
            model = self._compression.apply(plan, progress)
        save_compressed(model, self._run.path / "checkpoint", self._tokenizer)
        self._manifest.record("size", {"dense": dense, "compressed": _size(model)})
        # It may be no longer the original: whoever wants that loads it again.
        del self._loaded, self._compression

    def train(self) -> None:
        """With `recovery`, train ``checkpoint/`` into ``recovered/``; ``history.json`` is the Trainer's log."""
        if not self._recovers:
            return
        # Of the unrecovered model, should it have been judged before.
        self._run.forget("evaluate", "results.json")
        rows, recovery, folder = self._recovery_rows, self.config.recovery, self._run.path / "checkpoints"
        # In float32, whatever the model is stored in: small steps would be rounded away.
        recovered = recover(
            self._saved("checkpoint", torch.float32),
            rows,
            recovery,
            self.config.train,
            teacher=self._loaded if recovery.loss == "distill" else None,
            tokenizer=self._tokenizer,
            folder=folder,
            device=self.device,
            seed=self.config.seed,
            track=self._tracker.log,
        )
        self._manifest.record("trained_parameters", recovered.trained_parameters)
        self._run.write_json("history.json", recovered.history)
        dtype = getattr(torch, self.config.dtype)
        save_compressed(recovered.model, self._run.path / "recovered", self._tokenizer, dtype=dtype)
        shutil.rmtree(folder, ignore_errors=True)

    def evaluate(self) -> None:
        """Measure the saved models, and the dense one beside them: ``results.json``."""
        texts, is_recovered = self._data.evaluation(self._tokenizer), (self._run.path / "recovered").is_dir()
        # Whatever is wrong with it is found out before a model is loaded.
        _ = self._suite
        if self._recovers and not is_recovered:
            log.warning("evaluating the compressed model as it is: it was not recovered")
        records = []
        with StageProgress() as progress:
            if self._compressor is not None:
                records += [_record(text, self._dense_reference(text, progress), "dense") for text in texts]
                records += self._answers(self._loaded, "dense", progress)
            if is_recovered:
                records += self._judge(self._saved("checkpoint"), texts, "compressed", progress)
            model = (
                self._loaded if self._compressor is None else self._saved("recovered" if is_recovered else "checkpoint")
            )
            records += self._judge(model, texts, "final", progress)
            if self.config.eval.speed.enabled and self._compressor is not None:
                speeds = measure_speed(
                    {"dense": self._loaded, "compressed": model}, self.config.eval.speed, self.device, progress
                )
                source = f"random tokens, {self.config.dtype}, {torch.get_num_threads()} threads"
                records += speed_records(speeds["dense"], speeds["compressed"], source, VERSIONS)
        self._run.write_json("results.json", [asdict(record) for record in records])

    @property
    def _compressor(self) -> Compressor | None:
        return self.method if isinstance(self.method, Compressor) else None

    @cached_property
    def _loaded(self) -> PreTrainedModel:
        set_seed(self.config.seed)
        model = load_model(self._model_source, "causal", getattr(torch, self.config.dtype), self.device).model
        facts = {**self.config.model.model_dump(), "fingerprint": fingerprint(model, layout_of(model))}
        self._manifest.record("model", facts)
        self._fingerprint = facts["fingerprint"]
        return model

    @cached_property
    def _samples(self) -> CalibrationSamples:
        windows = self._data.calibration(self._tokenizer)
        self._manifest.record(
            "calibration", {"text": self._data.calibrated_on, "samples": len(windows), "tokens": windows.numel()}
        )
        return CalibrationSamples(tuple({"input_ids": window} for window in windows))

    @property
    def _probe_windows(self) -> Windows | None:
        probe = None if self._compressor is None else self._compressor.probe
        return None if probe is None else self._data.held_out(probe[0], self._tokenizer, probe[1])

    @cached_property
    def _compression(self) -> Compression[Any]:
        assert self._compressor is not None
        model, samples, windows = self._loaded, self._samples, self._probe_windows
        return at_work(
            self._compressor,
            Workbench(model, layout_of(model), samples, self.config.calibration.batch_size, self._cache, windows),
        )

    @property
    def _plan(self) -> Plan:
        file = self._run.path / "plan.json"
        if not file.is_file():
            self.plan()
        raw = json.loads(file.read_text())
        return Plan(**{**raw, "kept_blocks": tuple(raw["kept_blocks"])})

    @property
    def _recovers(self) -> bool:
        return self.config.recovery.what != "none"

    @cached_property
    def _recovery_rows(self) -> datasets.Dataset:
        return self._data.recovery(self._tokenizer)

    def _saved(self, name: Literal["checkpoint", "recovered"], dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What a stage has left; ``dtype`` None: the run's."""
        folder = self._run.path / name
        if name == "checkpoint" and not folder.is_dir():
            self.apply()
        gc.collect()
        dtype = dtype or getattr(torch, self.config.dtype)
        return load_model(ModelSource(str(folder)), "causal", dtype, self.device).model

    def _judge(
        self, model: PreTrainedModel, texts: list[EvaluationText], checkpoint: Checkpoint, progress: StageProgress
    ) -> list[EvalRecord]:
        size, device = self.task.batch_size, self.device
        perplexities = [
            _record(
                text,
                perplexity(model, text.windows, size, device, progress, f"{checkpoint} perplexity of {text.name}"),
                checkpoint,
            )
            for text in texts
        ]
        return perplexities + self._answers(model, checkpoint, progress)

    @cached_property
    def _suite(self) -> "Suite | None":
        """The benchmarks of the task. Errors: see `Exam`."""
        if not self._data.benchmarks:
            return None
        # Imported only now: lm-eval takes seconds, and most tasks have no benchmarks.
        from lowrank_kit.evaluation.harness import Exam
        from lowrank_kit.stages.suite import Suite

        allowed = self.config.eval.allow_code_execution
        exams = [Exam(questions, allowed) for questions in self._data.benchmarks.values()]
        tokenizer, limit = self._tokenizer, self.config.model.max_length
        longest = min(limit or tokenizer.model_max_length, tokenizer.model_max_length)
        return Suite(exams, tokenizer, self.config.eval.batch_size, longest, VERSIONS, self._run.path)

    def _answers(self, model: PreTrainedModel, checkpoint: Checkpoint, progress: StageProgress) -> list[EvalRecord]:
        """The figures of the benchmarks; the dense model's are measured once for all runs that have the same rows."""
        if self._suite is None:
            return []
        key = {
            "model": fingerprint(model, layout_of(model)),
            "dtype": self.config.dtype,
            "device": torch.device(self.device).type,
            "versions": VERSIONS,
        }
        shared = cache_dir() / "benchmarks" if checkpoint == "dense" else None
        return self._suite.judge(model, checkpoint, key, progress, shared)

    def _dense_reference(self, text: EvaluationText, progress: StageProgress) -> Perplexity:
        """The original model's perplexity, measured once for all runs that read the same windows."""
        model = self._loaded
        key: dict[str, Any] = {
            "model": self._fingerprint,
            "windows": hashlib.sha256(text.windows.numpy().tobytes()).hexdigest(),
            "shape": list(text.windows.shape),
            "dtype": self.config.dtype,
            "device": torch.device(self.device).type,
            "versions": VERSIONS,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        file = cache_dir() / "perplexity" / f"{digest}.json"
        if file.is_file():
            raw = json.loads(file.read_text())
            return Perplexity(**{**raw, "per_window": tuple(raw["per_window"])})
        found = perplexity(
            model, text.windows, self.task.batch_size, self.device, progress, f"dense perplexity of {text.name}"
        )
        write_atomically(file, json.dumps(asdict(found)))
        return found


def _size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _record(text: EvaluationText, found: Perplexity, checkpoint: Checkpoint) -> EvalRecord:
    return EvalRecord(
        text.name, "perplexity", found.value, found.stderr, len(text.windows), 0, text.source, VERSIONS, checkpoint
    )
