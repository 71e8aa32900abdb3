"""The stages of a perplexity task: a causal model is compressed, perhaps recovered, and judged beside the dense one."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.base import Adapter
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.base import Compressor, Context
from lowrank_kit.config import CausalTask
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.texts import TaskTexts, Windows
from lowrank_kit.evaluation.examples import ask
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.evaluation.speed import measure_speed, speed_records
from lowrank_kit.files import read_as
from lowrank_kit.method import Plan
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model, open_streamed
from lowrank_kit.progress import StageProgress
from lowrank_kit.stages.base import VERSIONS, Stages
from lowrank_kit.stages.effects import EFFECTS_FILE, Effects, Inputs, windows_or_rows
from lowrank_kit.stages.judging import CausalJudge
from lowrank_kit.training.adapters import AdaptedModel
from lowrank_kit.training.fit import Examples, Session
from lowrank_kit.training.initialise import adapt
from lowrank_kit.training.recover import Recovered, recover

log = logging.getLogger(__name__)


class PerplexityStages(Stages[CausalTask, TaskTexts]):
    """See `Stages`; ``checkpoint/`` is the compressed model, ``recovered/`` that one after its recovery.

    What is judged is what was saved there.
    """

    def calibrate(self) -> None:
        """Let the compressor look at the model; what it keeps goes to the content-keyed cache, for every ratio."""
        # Texts that are too short are found out before the model is loaded.
        _ = self._judge.texts, self._judge.suite
        if self._recovers:
            _ = self._recovery_rows, padding_id(self._tokenizer, self._model_config)
        if self._compressor is not None:
            _ = self._samples, self._probe_windows
            with StageProgress() as progress:
                if self._cache is None:
                    # What the others would have to read is in a folder of the first process.
                    distributed.on_main(lambda: self._statistics_with(progress))
                else:
                    self._statistics_with(progress)

    def plan(self) -> None:
        """Decide what is kept: ``plan.json``, with ``plots/``."""
        if self._compressor is None:
            return
        with StageProgress() as progress:
            statistics = self._statistics_with(progress)
            plan = self._compressor.plan(statistics, self._context(progress))
        self._run.write_json("plan.json", plan.as_json())
        with self._run.write_folder("plots") as plots:
            self._compressor.plot(plan, statistics, self._context(None), plots)
        removed = 1 - plan.parameters_after / plan.parameters_before
        log.info("%.4f of the decoder-linear parameters removed, asked for: %g", removed, self._compressor.ratio)

    def apply(self) -> None:
        """Compress as planned: ``checkpoint/``, which plain transformers loads."""
        if self._compressor is None:
            return
        plan, dense = self._plan, _size(self._loaded)
        with StageProgress() as progress:
            statistics = self._statistics_with(progress)
            model = self._compressor.apply(plan, statistics, self._context(progress))
        save_compressed(model, self._run.path / "checkpoint", self._tokenizer)
        self._manifest.record("size", {"dense": dense, "compressed": _size(model)})
        # It may be no longer the original: whoever wants that loads it again.
        del self._loaded, self._statistics

    def train(self) -> None:
        """With `recovery`, train ``checkpoint/`` into ``recovered/``; ``history.json`` is the Trainer's log.

        An adapter is in ``adapter/`` as well, plain PEFT on ``checkpoint/``.
        """
        if not self._recovers:
            return
        # Of the unrecovered model, should it have been judged before.
        self._run.forget("evaluate", "results.json", EFFECTS_FILE)
        rows, recovery, folder = self._recovery_rows, self.config.recovery, self._run.path / "checkpoints"
        # In float32, whatever the model is stored in: small steps would be rounded away.
        model = self._saved("checkpoint", torch.float32)
        ready, looks = self._adapted(model, rows) if recovery.method else (None, [])
        recovered = recover(
            model,
            Examples(rows, RightPadded(padding_id(self._tokenizer, model.config))),
            recovery,
            self.config.train,
            Session(folder, self.device, self.config.seed, self._tracker.log),
            adapted=ready,
            teacher=self._loaded if recovery.loss == "distill" else None,
            callbacks=looks if launcher.is_main() else [],
        )
        self._manifest.record("trained_parameters", recovered.trained_parameters)
        self._run.write_json("history.json", recovered.history)
        distributed.on_main(lambda: self._export(recovered, ready))
        self._run.remove(folder.name)

    def _export(self, recovered: Recovered, adapted: AdaptedModel | None) -> None:
        if adapted:
            with self._run.write_folder("adapter") as folder:
                adapted.export(folder, str(self._run.path / "checkpoint"))
        dtype = getattr(torch, self.config.dtype)
        save_compressed(recovered.merged(), self._run.path / "recovered", self._tokenizer, dtype=dtype)

    def evaluate(self) -> None:
        """Measure the saved models, and the dense one beside them: ``results.json``.

        With `runtime=spread` each lies over all devices of the machine.
        """
        is_recovered = (self._run.path / "recovered").is_dir()
        # Whatever is wrong with them is found out before a model is loaded.
        _ = self._judge.texts, self._judge.suite
        if self._recovers and not is_recovered:
            log.warning("evaluating the compressed model as it is: it was not recovered")
        compared: Inputs = ()
        records, saved = [], partial(self._saved, placement=self.config.runtime.placement)
        with StageProgress() as progress:
            if self._compressor is not None:
                records += self._judged(self._original, "dense", progress, as_it_came=True)
            if is_recovered:
                unrecovered = saved("checkpoint")
                records += self._judged(unrecovered, "compressed", progress)
                if self.config.eval.effects.enabled:
                    compared = windows_or_rows(self._judge.texts, self._recovery_rows, self.config.eval.effects.rows)
                    drift_of = self._effects.drift_of(unrecovered, compared, self.device)
                del unrecovered
            model = self._original if self._compressor is None else saved("recovered" if is_recovered else "checkpoint")
            records += self._judged(model, "final", progress, as_it_came=self._compressor is None)
            if self.config.eval.speed.enabled and self._compressor is not None:
                both = {"dense": self._original, "compressed": model}
                # Of one process alone: the others wait.
                speeds = distributed.on_main(lambda: measure_speed(both, self.config.eval.speed, self.device, progress))
                source = f"random tokens, {self.config.dtype}, {torch.get_num_threads()} threads"
                records += speed_records(speeds["dense"], speeds["compressed"], source, VERSIONS)
        if compared:
            rows = f"{len(compared)} windows, against the compressed model"
            self._effects.write(drift_of(model), rows, records, self._initialisation, before="compressed")
        self._run.write_json("results.json", [asdict(record) for record in records])

    @cached_property
    def _judge(self) -> CausalJudge:
        self._manifest.record("bos", self._data.openings(self._tokenizer))
        return CausalJudge(self.config, self.task, self._data, self._tokenizer, self._run.path, self.device)

    def _judged(
        self, model: PreTrainedModel, checkpoint: Checkpoint, progress: StageProgress, as_it_came: bool = False
    ) -> list[EvalRecord]:
        return self._judge.judge(model, layout_of(model), checkpoint, progress, as_it_came)

    @property
    def _compressor(self) -> Compressor | None:
        return self.method if isinstance(self.method, Compressor) else None

    @cached_property
    def _loaded(self) -> PreTrainedModel:
        """The model as it came, on the run's device, or streamed from its files."""
        return self._load(streamed=self.config.runtime.weights == "streamed")

    @cached_property
    def _original(self) -> PreTrainedModel:
        """The model as it came, where it is to be judged."""
        runtime = self.config.runtime
        is_whole = runtime.placement is None and runtime.weights == "resident"
        return self._loaded if is_whole else self._load(runtime.placement)

    def _load(self, placement: Mapping[str, Any] | None = None, streamed: bool = False) -> PreTrainedModel:
        set_seed(self.config.seed)
        dtype = getattr(torch, self.config.dtype)
        if streamed:
            model = open_streamed(self._model_source, dtype, self._run.path / ".checkpoint", self.device)
        else:
            model = load_model(self._model_source, "causal", dtype, self.device, placement=placement).model
        facts = {**self.config.model.model_dump(), "fingerprint": fingerprint(model, layout_of(model), "loss")}
        self._manifest.record("model", facts)
        return model

    @cached_property
    def _samples(self) -> CalibrationSamples:
        windows = self._data.calibration(self._tokenizer)
        self._manifest.record(
            "calibration", {"text": self._data.calibrated_on, "samples": len(windows), "tokens": windows.numel()}
        )
        opening = self._data.opening("calibration", self._tokenizer)
        return CalibrationSamples(tuple({"input_ids": window} for window in windows), len(opening))

    @property
    def _probe_windows(self) -> Windows | None:
        probe = None if self._compressor is None else self._compressor.probe
        return None if probe is None else self._data.held_out(probe[0], self._tokenizer, probe[1])

    def _context(self, progress: StageProgress | None) -> Context:
        if self._compressor is not None and self._compressor.factorises:
            list_experts(self._loaded)
        return Context(
            self._loaded,
            layout_of(self._loaded),
            self._samples,
            self.config.calibration.batch_size,
            self._cache or self._own_cache,
            self._probe_windows,
            progress,
        )

    def _statistics_with(self, progress: StageProgress) -> Any:
        """What the compressor found of the original model: at hand, or in the cache, or found now."""
        if "_statistics" not in vars(self):
            assert self._compressor is not None
            self._statistics = self._compressor.calibrate(self._context(progress))
        return self._statistics

    @cached_property
    def _own_cache(self) -> Path:
        """In place of the shared one, gone with this process."""
        self._keeps_alive = TemporaryDirectory(prefix="lowrank_kit-")
        return Path(self._keeps_alive.name)

    @property
    def _plan(self) -> Plan:
        file = self._run.path / "plan.json"
        if not file.is_file():
            self.plan()
        plan: Plan = read_as(file, Plan)
        return plan

    @property
    def _recovers(self) -> bool:
        return self.config.recovery.what != "none"

    @cached_property
    def _recovery_rows(self) -> datasets.Dataset:
        return self._data.recovery(self._tokenizer, ask)

    def _adapted(
        self, model: PreTrainedModel, rows: datasets.Dataset
    ) -> tuple[AdaptedModel, Sequence[TrainerCallback]]:
        """The compressed model with the adapter of `recovery.method`, calibrated on what it learns, and its looks."""
        method, settings = self.config.recovery.method, self.config.calibration
        assert isinstance(method, Adapter)
        chosen = rows.select(range(min(settings.samples, len(rows))))
        samples = CalibrationSamples(
            tuple({name: torch.tensor(ids[: settings.seq_len]) for name, ids in row.items()} for row in chosen),
            len(self._data.opening(self._data.learnt_as, self._tokenizer)),
        )
        looks = []
        if self.config.eval.effects.enabled:
            ranks = method.base_ranks(layout_of(model))
            looks.append(self._effects.energy(model, method, ranks, samples, settings.batch_size, self._cache))
        started = time.perf_counter()
        set_seed(self.config.seed)
        ready = adapt(model, method, samples, task_type="CAUSAL_LM", batch_size=settings.batch_size, cache=self._cache)
        self._note("start", started)
        return ready, looks

    @property
    def _effects(self) -> Effects:
        return Effects(self._run, self.config.eval.effects)

    def _saved(
        self,
        name: Literal["checkpoint", "recovered"],
        dtype: torch.dtype | None = None,
        placement: Mapping[str, Any] | None = None,
    ) -> PreTrainedModel:
        """What a stage has left; ``dtype`` None: the run's."""
        folder = self._run.path / name
        if name == "checkpoint" and not folder.is_dir():
            distributed.on_main(self.apply)
        gc.collect()
        dtype = dtype or getattr(torch, self.config.dtype)
        return load_model(ModelSource(str(folder)), "causal", dtype, self.device, placement=placement).model


def _size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }
