"""From a method's settings to an adapted model: calibrate, plan, compute the factors, attach."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedModel

from lowrank_kit.adapters.adapter import Adapter, Batches, FineTuning, InitialisedAdapter
from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import Kept, LayerStatistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import dense_weight
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.training.adapters import Adapted, AdaptedModel, attach
from lowrank_kit.training.full import unfreeze


def adapt(
    model: PreTrainedModel,
    method: Adapter,
    samples: CalibrationSamples,
    *,
    new_modules: Sequence[str] = (),
    task_type: str | None = None,
    cache: Path | None = None,
) -> AdaptedModel:
    """Give ``model`` the method's adapter, ready to train; the model is changed in place.

    Args:
        model: the original model.
        method: for example ``Astra(name="astra", rank=32)``.
        samples: what a method that looks at activations or gradients is calibrated with; as for `adapted`.
        new_modules: newly initialised modules, which learn in full.
        task_type: PEFT's name of the task (``SEQ_CLS``, ``CAUSAL_LM``), or None.
        cache: folder of the calibration cache; None keeps nothing on disk.
    """
    method.check(layout_of(model))
    kept = calibrate_for(method, model, samples, cache=cache)
    plan = method.plan(layout_of(model), kept)
    ready = adapted(method, model, plan, kept, samples, new_modules=new_modules, task_type=task_type)
    assert isinstance(ready, AdaptedModel)
    return ready


def calibrate_for(
    method: FineTuning,
    model: PreTrainedModel,
    samples: CalibrationSamples,
    *,
    cache: Path | None,
    progress: Progress | None = None,
) -> dict[str, Kept]:
    """What the method keeps of every linear it adapts; nothing where the weights alone decide.

    Raises `LowRankKitError` for a method that needs samples where there are none.
    """
    if not isinstance(method, Adapter) or not method.calibrates:
        return {}
    layout = layout_of(model)
    method, samples = method.matched(layout), _present(samples).without_labels()
    samples = replace(samples, batch_size=method.rows_a_batch or samples.batch_size)
    targets = method.targets(layout)
    if not isinstance(method, InitialisedAdapter):
        return method.collect(model, targets, _batches(model, samples))
    ours, request = method, method.needs()
    assert request is not None

    def reduce(statistics: LayerStatistics) -> Kept:
        module = model.get_submodule(statistics.ref.name)
        return ours.reduce(dense_weight(module), module.bias, statistics)

    reduction = Reduction(request, reduce, type(method), method.reduction_key())
    return calibrate(model, samples, targets, reduction, cache=cache, progress=progress)


def adapted(
    method: FineTuning,
    model: PreTrainedModel,
    plan: Plan,
    kept: Mapping[str, Kept],
    samples: CalibrationSamples | None,
    *,
    new_modules: Sequence[str],
    task_type: str | None,
) -> Adapted:
    """Make ``model`` ready to train by any method; it is changed in place.

    Args:
        method: an adapter or full fine-tuning.
        model: the original model.
        plan: the method's own, of this model.
        kept: what `calibrate_for` returned.
        samples: the calibration set; only methods with ``method.calibrates`` read it. LoRA-GA differentiates the loss
            of their ``labels`` (a class each, or a token id a token, -100 where none counts); of a causal language
            model whose samples have none, that of the next token.
        new_modules: newly initialised modules, which learn in full.
        task_type: PEFT's name of the task (``SEQ_CLS``, ``CAUSAL_LM``), or None.

    Raises:
        LowRankKitError: a method that needs samples has none; of `attach`.
    """
    if isinstance(method, FullFineTuning):
        return unfreeze(model, method, new_modules)
    assert isinstance(method, Adapter)
    method = method.matched(layout_of(model))
    factors = starting_factors(method, model, plan, kept)
    batches: Batches = ()
    if method.calibrates and not isinstance(method, InitialisedAdapter):
        batches = _batches(model, _present(samples))
    return attach(model, method, plan, factors, new_modules, task_type, kept=kept, batches=batches)


def starting_factors(
    method: Adapter, model: PreTrainedModel, plan: Plan, kept: Mapping[str, Kept]
) -> dict[str, LowRankFactors]:
    """The factors of every planned linear, float32; none for a method that PEFT initialises."""
    if not isinstance(method, InitialisedAdapter):
        return {}
    factors = {}
    for name, rank in plan.ranks.items():
        start = method.initialise(dense_weight(model.get_submodule(name)), kept.get(name, {}), rank)
        factors[name] = LowRankFactors(start.up.float(), start.down.float())
    return factors


def _present(samples: CalibrationSamples | None) -> CalibrationSamples:
    if samples is None or not samples.sequences:
        raise LowRankKitError(
            "the calibration set is empty, and the method starts from activations or gradients: raise "
            "calibration.samples, choose a task with training rows, or a method that starts from weights alone (lora, "
            "dora, pissa, milora, olora, mica)"
        )
    return samples


def _batches(model: PreTrainedModel, samples: CalibrationSamples) -> Batches:
    config = model.config
    if config.is_encoder_decoder:
        samples = samples.with_decoder_inputs(config.decoder_start_token_id)
    padded = batches_of(model, samples)
    return [{name: values.to(model.device) for name, values in batch.items()} for batch in padded]
