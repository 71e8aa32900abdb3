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
from lowrank_kit.compression.apply import factorise
from lowrank_kit.compression.decompose import Decomposition, decompose
from lowrank_kit.compression.probe import LossProbe
from lowrank_kit.compression.sequential import factorise_sequentially
from lowrank_kit.config import PerplexityTask
from lowrank_kit.data.texts import EvaluationText, TaskTexts, Windows
from lowrank_kit.evaluation.perplexity import Perplexity, perplexity
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.evaluation.speed import measure_speed, speed_records
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.svd import TruncatedSVD
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, fingerprint, load_model
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.plots.spectra import plot_spectra
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.directory import write_atomically
from lowrank_kit.stages.base import VERSIONS, Stages

log = logging.getLogger(__name__)


class PerplexityStages(Stages[PerplexityTask, TaskTexts]):
    """See `Stages`; ``checkpoint/`` is the compressed model, and what is judged is what was saved there."""

    def calibrate(self) -> None:
        """Decompose every matrix; spectra and vectors go to the content-keyed cache, for every ratio to come."""
        # Texts that are too short are found out before the model is loaded.
        self._data.evaluation(self._tokenizer)
        if self._compressor is not None:
            _ = self._samples, self._probe_windows
            _ = self._decomposition

    def plan(self) -> None:
        """Decide every rank: ``plan.json``, with ``plots/`` of spectra and ranks."""
        method = self._compressor
        if method is None:
            return
        layout, decomposition = layout_of(self._loaded), self._decomposition
        with StageProgress() as progress:
            windows = self._probe_windows
            probe = None if windows is None else LossProbe(self._loaded, decomposition, windows, progress)
            plan = method.plan(layout, decomposition.candidates, probe)
        self._run.write_json("plan.json", asdict(plan))
        with self._run.write_folder("plots") as plots:
            singular = {c.name: c.tail.sqrt().tolist() for c in decomposition.candidates}
            plot_spectra(layout.linears, singular, plots / "spectra.png", f"singular value ({method.truncation.kind})")
            plot_rank_map(layout.linears, plan.ranks, plots / "rank_map.png")
            plot_kept_ranks(layout.linears, plan.ranks, plots / "kept_ranks.png")
        removed = 1 - plan.parameters_after / plan.parameters_before
        log.info("%.4f of the decoder-linear parameters removed, asked for: %g", removed, method.ratio)

    def apply(self) -> None:
        """Factorise the planned matrices: ``checkpoint/``, which plain transformers loads."""
        method = self._compressor
        if method is None:
            return
        plan, model, decomposition = self._plan, self._loaded, self._decomposition
        dense = _size(model)
        with StageProgress() as progress:
            if method.correction == "sequential":
                factorise_sequentially(
                    model,
                    method,
                    plan,
                    self._samples,
                    batch_size=self.config.calibration.batch_size,
                    gradients=decomposition.gradients,
                    progress=progress,
                )
            else:
                factorise(model, plan, decomposition)
        save_compressed(model, self._run.path / "checkpoint", self._tokenizer)
        self._manifest.record("size", {"dense": dense, "compressed": _size(model)})
        # It is no longer the original: whoever wants that loads it again.
        del self._loaded

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
    def _compressor(self) -> TruncatedSVD | None:
        return self.method if isinstance(self.method, TruncatedSVD) else None

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
        """Held-out calibration windows for an allocation that measures the model."""
        method = self._compressor
        if method is None or not method.allocation.needs_probe:
            return None
        return self._data.held_out(method.probe_windows, self._tokenizer, method.probe_seq_len)

    @cached_property
    def _decomposition(self) -> Decomposition:
        assert self._compressor is not None
        samples = self._samples
        with StageProgress() as progress:
            return decompose(
                self._loaded,
                self._compressor,
                samples,
                batch_size=self.config.calibration.batch_size,
                cache=self._cache,
                progress=progress,
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
