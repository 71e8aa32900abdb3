"""The stages of a perplexity task: a causal model is compressed and judged beside the dense one."""

import gc
import hashlib
import json
import logging
from dataclasses import asdict
from functools import cached_property
from typing import Any

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

log = logging.getLogger(__name__)


class PerplexityStages(Stages[PerplexityTask, TaskTexts]):
    """See `Stages`; ``checkpoint/`` is the compressed model, and what is judged is what was saved there."""

    def calibrate(self) -> None:
        """Let the compressor look at the model; what it keeps goes to the content-keyed cache, for every ratio."""
        # Texts that are too short are found out before the model is loaded.
        self._data.evaluation(self._tokenizer)
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
        """Nothing: compression needs no training."""

    def evaluate(self) -> None:
        """Measure the saved model, and the dense one beside it: ``results.json``."""
        records = []
        texts = self._data.evaluation(self._tokenizer)
        model = self._compressed if self._compressor is not None else self._loaded
        with StageProgress() as progress:
            for text in texts:
                if self._compressor is not None:
                    records.append(_record(text, self._dense_reference(text, progress), "dense"))
                found = perplexity(
                    model, text.windows, self.task.batch_size, self.device, progress, f"perplexity of {text.name}"
                )
                records.append(_record(text, found, "final"))
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
    def _compressed(self) -> PreTrainedModel:
        folder = self._run.path / "checkpoint"
        if not folder.is_dir():
            self.apply()
        gc.collect()
        return load_model(ModelSource(str(folder)), "causal", getattr(torch, self.config.dtype), self.device).model

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
