"""The stages of a causal model that is compressed, perhaps recovered, and evaluated beside the dense one."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.adapter import Adapter
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.config import CausalTask, RunConfig
from lowrank_kit.data.causal import CausalData
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.data.recovery_rows import RecoveryRows
from lowrank_kit.evaluation.examples import ask
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.evaluation.speed import measure_speed, speed_records
from lowrank_kit.files import read_as
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import LoadedModel
from lowrank_kit.models.rounded import rounded_linears
from lowrank_kit.plan import Plan
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.provenance import VERSIONS
from lowrank_kit.stages.causal_evaluation import CausalEvaluator
from lowrank_kit.stages.ledger import Ledger
from lowrank_kit.stages.models import Models, Opened, loaded
from lowrank_kit.stages.training_effects import EFFECTS_FILE, Effects, windows_or_rows
from lowrank_kit.stages.workplace import Workplace
from lowrank_kit.training.adapters import AdaptedModel
from lowrank_kit.training.fit import Examples, Session
from lowrank_kit.training.initialise import adapt
from lowrank_kit.training.recover import Recovered, recover

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
# What `apply` goes on from after it was killed.
UNFINISHED = ".unfinished"


class CompressionStages:
    """One task's run of a compressor, or of no method: then the model is evaluated as it is.

    ``checkpoint/`` is the compressed model, ``recovered/`` that one after its recovery. What was saved there is
    evaluated.
    """

    def __init__(self, config: RunConfig, task: CausalTask, data: CausalData, models: Models, place: Workplace) -> None:
        self.config, self.task, self.data, self.models, self.place = config, task, data, models, place
        self.effects = Effects(place.run, config.eval.effects)

    @property
    def method(self) -> Compressor:
        """The method, where it compresses."""
        return cast(Compressor, self.config.method)

    def run(self, ledger: Ledger) -> None:
        """Do the stages that are to be done."""
        if self.config.method.compresses:
            self._compress(ledger)
        else:
            for stage in ("calibrate", "plan", "apply"):
                ledger.do(stage, self.read_data)
        ledger.do("train", self.train)
        ledger.do("evaluate", self.evaluate)

    def _compress(self, ledger: Ledger) -> None:
        # Each is made once, by the first stage that needs it.
        with self.compressible() as original, self._statistics_folder() as folder, StageProgress() as progress:
            context = cache(lambda: self.context(original, folder, progress))
            statistics = cache(lambda: self.calibrate(context))
            plan = cache(lambda: self.plan(statistics(), context()))

            def calibrate() -> None:
                statistics()

            # Without a cache, what the others would have to read is in a folder of the first process.
            ledger.do("calibrate", calibrate, alone=self.place.cache is None)
            ledger.do("plan", plan, alone=True)
            ledger.do("apply", lambda: self.apply(self._left_plan() or plan(), statistics(), context()), alone=True)

    def calibrate(self, context: Callable[[], Context]) -> Any:
        """Let the compressor read the model; what it keeps is in the content-keyed cache, for every ratio."""
        self.read_data()
        return self.method.calibrate(context())

    def plan(self, statistics: Any, context: Context) -> Plan:
        """Decide what is kept: ``plan.json``, with ``plots/``."""
        plan = self.method.plan(statistics, context)
        self.place.run.write_json(PLAN_FILE, plan.as_json())
        with self.place.run.write_folder("plots") as plots:
            self.method.plot(plan, statistics, context, plots)
        counted, before, after = "parameters", plan.parameters_before, plan.parameters_after
        if plan.bytes_before:
            counted, before, after = "bytes", plan.bytes_before, plan.bytes_after
        log.info("%.4f of the decoder-linear %s removed, asked for: %g", 1 - after / before, counted, self.method.ratio)
        return plan

    def apply(self, plan: Plan, statistics: Any, context: Context) -> Path:
        """Compress as planned; return ``checkpoint/``, which plain transformers loads."""
        dense = _size(context.model)
        model = self.method.apply(plan, statistics, context)
        save_compressed(model, self._checkpoint, self.models.tokenizer)
        self.place.run.remove(UNFINISHED)
        self.place.manifest.record("size", {"dense": dense, "compressed": _size(model)})
        return self._checkpoint

    def train(self) -> Path | None:
        """With `recovery`, train ``checkpoint/`` and return ``recovered/``; ``history.json`` is the Trainer's log.

        An adapter is in ``adapter/`` as well, plain PEFT on ``checkpoint/``.
        """
        recovery, run = self.config.recovery, self.place.run
        if not recovery.trains:
            return None
        # Of the unrecovered model, should it have been evaluated before.
        run.forget("evaluate", "results.json", EFFECTS_FILE)
        rows, folder = self._recovery_rows, self.place.path / "checkpoints"
        teacher = self.original() if recovery.loss == "distill" else nullcontext()
        # In float32, whatever the model is stored in: small steps would be rounded away.
        with self.compressed(torch.float32) as compressed, teacher as original:
            model = compressed.model
            ready, callbacks = self._adapted(model, rows) if recovery.method else (None, [])
            recovered = recover(
                model,
                Examples(rows, RightPadded(padding_id(self.models.tokenizer, model.config))),
                recovery,
                self.config.train,
                Session(folder, self.models.device, self.config.seed, self.place.tracker.log),
                adapted=ready,
                teacher=original.model if original else None,
                callbacks=callbacks if launcher.is_main() else [],
            )
            self.place.manifest.record("trained_parameters", recovered.trained_parameters)
            run.write_json("history.json", recovered.history)
            distributed.on_main(lambda: self._export(recovered, ready))
        run.remove(folder.name)
        return self._recovered

    def evaluate(self) -> list[EvalRecord]:
        """Measure the saved models, and the dense one beside them: ``results.json``.

        With `runtime=spread` each lies over all devices of the machine.
        """
        # Whatever is wrong with the data is found out before a model is loaded.
        self._evaluator.check()
        if self.config.recovery.trains and not self._recovered.is_dir():
            log.warning("evaluating the compressed model as it is: it was not recovered")
        with StageProgress() as progress:
            compresses = self.config.method.compresses
            records = self._evaluate_all(progress) if compresses else self._evaluate_dense("final", progress)
        self.place.run.write_json("results.json", [asdict(record) for record in records])
        return records

    def _evaluate_dense(self, checkpoint: Checkpoint, progress: StageProgress) -> list[EvalRecord]:
        with self.original(spread=True) as original:
            return self._evaluated(original.model, checkpoint, progress, as_it_came=True)

    def _evaluate_all(self, progress: StageProgress) -> list[EvalRecord]:
        records, effects = self._evaluate_dense("dense", progress), self.config.eval.effects
        is_recovered, drift_of = self._recovered.is_dir(), None
        if is_recovered:
            with self.compressed(spread=True) as compressed:
                records += self._evaluated(compressed.model, "compressed", progress)
                if effects.enabled:
                    compared = windows_or_rows(self._evaluator.texts, self._recovery_rows, effects.rows)
                    drift_of = self.effects.drift_of(compressed.model, compared, self.models.device)
        with self.recovered() if is_recovered else self.compressed(spread=True) as final:
            records += self._evaluated(final.model, "final", progress)
            if self.config.eval.speed.enabled:
                records += self._speed(final.model, progress)
            if drift_of:
                rows = f"{len(compared)} windows, against the compressed model"
                place = self.place
                self.effects.write(drift_of(final.model), rows, records, place.initialisation, before="compressed")
        return records

    def read_data(self) -> None:
        """Find out what is wrong with the data, before a model is loaded."""
        self._evaluator.check()
        if self.config.recovery.trains:
            _ = self._recovery_rows, padding_id(self.models.tokenizer, self.models.configuration)
        if self.config.method.compresses:
            _ = self._samples, self._probe_windows

    def original(self, *, spread: bool = False) -> AbstractContextManager[Opened]:
        """The model as it came, whole, for a `with` block."""
        return loaded(lambda: self._noted(self.models.causal(spread=spread)))

    def compressible(self) -> AbstractContextManager[Opened]:
        """The model as it came, to be compressed in a `with` block: with `runtime.weights=streamed`, a block of it."""
        if self.config.runtime.weights == "resident":
            return self.original()
        return loaded(lambda: self._noted(self.models.streamed(self.place.path / ".checkpoint")))

    def compressed(self, dtype: torch.dtype | None = None, *, spread: bool = False) -> AbstractContextManager[Opened]:
        """``checkpoint/`` for a `with` block; compressed now where no stage has left it."""
        if not self._checkpoint.is_dir():
            distributed.on_main(self._compress_now)
        return loaded(lambda: self.models.saved(self._checkpoint, dtype, spread=spread))

    def recovered(self) -> AbstractContextManager[Opened]:
        """``recovered/`` for a `with` block."""
        return loaded(lambda: self.models.saved(self._recovered, spread=True))

    def context(self, original: Opened, folder: Path, progress: StageProgress) -> Context:
        """What the compressor works with; statistics go to ``folder``."""
        model = original.model
        if self.method.factorises:
            list_experts(model)
        unfinished = self.place.path / UNFINISHED
        return Context(model, layout_of(model), self._samples, folder, self._probe_windows, unfinished, progress)

    def _compress_now(self) -> Path:
        with self.compressible() as original, self._statistics_folder() as folder, StageProgress() as progress:
            context = self.context(original, folder, progress)
            statistics = self.method.calibrate(context)
            return self.apply(self._left_plan() or self.plan(statistics, context), statistics, context)

    @contextmanager
    def _statistics_folder(self) -> Iterator[Path]:
        """The cache, or a folder that lasts for the block."""
        if self.place.cache:
            yield self.place.cache
        else:
            with tempfile.TemporaryDirectory(prefix="lowrank_kit-") as folder:
                yield Path(folder)

    def _left_plan(self) -> Plan | None:
        """The plan that a stage has left."""
        file = self.place.path / PLAN_FILE
        return read_as(file, Plan) if file.is_file() else None

    def _speed(self, model: PreTrainedModel, progress: StageProgress) -> list[EvalRecord]:
        """Of the dense model and this one, side by side; the other processes wait for the first."""
        with self.original(spread=True) as original:
            both = {"dense": original.model, "compressed": model}
            settings, device = self.config.eval.speed, self.models.device
            speeds = distributed.on_main(lambda: measure_speed(both, settings, device, progress))
        source = f"random tokens, {self.config.dtype}, {torch.get_num_threads()} threads"
        return speed_records(speeds["dense"], speeds["compressed"], source, VERSIONS)

    def _evaluated(
        self, model: PreTrainedModel, checkpoint: Checkpoint, progress: StageProgress, as_it_came: bool = False
    ) -> list[EvalRecord]:
        return self._evaluator.evaluate(model, layout_of(model), checkpoint, progress, as_it_came)

    def _adapted(self, model: PreTrainedModel, rows: datasets.Dataset) -> tuple[AdaptedModel, list[TrainerCallback]]:
        """The compressed model with the adapter of `recovery.method`, and what measures its update."""
        method, settings = cast(Adapter, self.config.recovery.method), self.config.calibration
        chosen = rows.select(range(min(settings.samples, len(rows))))
        samples = CalibrationSamples(
            tuple({name: torch.tensor(ids[: settings.seq_len]) for name, ids in row.items()} for row in chosen),
            len(self._recovery.opening(self.models.reader)),
            settings.batch_size,
        )
        callbacks: list[TrainerCallback] = []
        if self.config.eval.effects.enabled:
            layout = layout_of(model)
            targets, ranks = method.targets(layout), method.base_ranks(layout)
            callbacks.append(self.effects.energy(model, targets, ranks, samples, self.place.cache))
        with self.place.timing("start"):
            set_seed(self.config.seed)
            ready = adapt(model, method, samples, task_type="CAUSAL_LM", cache=self.place.cache)
        return ready, callbacks

    def _export(self, recovered: Recovered, adapted: AdaptedModel | None) -> None:
        if adapted:
            with self.place.run.write_folder("adapter") as folder:
                adapted.export(folder, str(self._checkpoint))
        save_compressed(recovered.merged(), self._recovered, self.models.tokenizer, dtype=self.models.dtype)

    def _noted(self, found: LoadedModel) -> LoadedModel:
        """The model as it came, told of in the manifest."""
        facts = {"fingerprint": fingerprint(found.model, layout_of(found.model), "loss")}
        self.place.manifest.record("model", {**self.config.model.model_dump(), **facts})
        return found

    @property
    def _checkpoint(self) -> Path:
        return self.place.path / "checkpoint"

    @property
    def _recovered(self) -> Path:
        return self.place.path / "recovered"

    @cached_property
    def _evaluator(self) -> CausalEvaluator:
        return CausalEvaluator(self.task, self.data.texts, self.config.eval, self.models, self.place)

    @cached_property
    def _samples(self) -> CalibrationSamples:
        windows = self.data.texts.calibration(self.models.reader)
        text = {"text": self.data.texts.calibrated_on, "samples": len(windows), "tokens": windows.numel()}
        self.place.manifest.record("calibration", text)
        opening = self.data.texts.opening("calibration", self.models.reader)
        return CalibrationSamples(
            tuple({"input_ids": window} for window in windows), len(opening), self.config.calibration.batch_size
        )

    @property
    def _probe_windows(self) -> torch.Tensor | None:
        probe = self.method.probe
        return None if probe is None else self.data.texts.held_out(probe[0], self.models.reader, probe[1])

    @cached_property
    def _recovery_rows(self) -> datasets.Dataset:
        return self._recovery.rows(self.models.reader, ask)

    @property
    def _recovery(self) -> RecoveryRows:
        assert self.data.recovery is not None
        return self.data.recovery


def _size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model, tied ones once, and their bytes; rounded weights are in the latter alone."""
    parameters = list(model.parameters())
    rounded = [tensor for _, layer in rounded_linears(model) for tensor in layer.buffers()]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in (*parameters, *rounded)),
    }
