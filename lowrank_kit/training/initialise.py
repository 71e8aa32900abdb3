"""From a method's settings to an adapted model: calibrate, plan, compute the factors, attach."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedModel

from lowrank_kit.calibration.collect import Kept, calibrate
from lowrank_kit.calibration.statistics import LayerStatistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.methods.base import Adapter, InitialisedAdapter, LowRankFactors, Plan
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.training.adapters import AdaptedModel, attach


def adapt(
    model: PreTrainedModel,
    method: Adapter,
    samples: CalibrationSamples,
    *,
    new_modules: Sequence[str] = (),
    task_type: str | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
) -> AdaptedModel:
    """Give ``model`` the method's adapter, ready to train; the model is changed in place.

    Args:
        model: the original model.
        method: for example ``Astra(name="astra", rank=32)``.
        samples: what a method that looks at activations is calibrated with.
        new_modules: newly initialised modules, which learn in full.
        task_type: PEFT's name of the task (``SEQ_CLS``, ``CAUSAL_LM``), or None.
        batch_size: calibration sequences a batch.
        cache: folder of the calibration cache; None keeps nothing on disk.
    """
    method.check(layout_of(model))
    kept = calibrate_for(method, model, samples, batch_size=batch_size, cache=cache)
    plan = method.plan(layout_of(model), kept)
    return attach(model, method, plan, starting_factors(method, model, plan, kept), new_modules, task_type)


def calibrate_for(
    method: Adapter,
    model: PreTrainedModel,
    samples: CalibrationSamples,
    *,
    batch_size: int,
    cache: Path | None,
    progress: Progress | None = None,
) -> dict[str, Kept]:
    """What the method keeps of every linear it adapts; nothing where the weights alone decide."""
    request = method.needs() if isinstance(method, InitialisedAdapter) else None
    if not isinstance(method, InitialisedAdapter) or request is None:
        return {}

    def reduce(statistics: LayerStatistics) -> Kept:
        module = model.get_submodule(statistics.ref.name)
        return method.reduce(weight_of(module), module.bias, statistics)

    layout = layout_of(model)
    return calibrate(
        model,
        layout,
        samples,
        method.targets(layout),
        request,
        reduce,
        batch_size=batch_size,
        cache=cache,
        reduction_key=method.reduction_key(),
        progress=progress,
    )


def starting_factors(
    method: Adapter, model: PreTrainedModel, plan: Plan, kept: Mapping[str, Kept]
) -> dict[str, LowRankFactors]:
    """The factors of every planned linear, float32; none for a method that starts at PEFT's zero product."""
    if not isinstance(method, InitialisedAdapter):
        return {}
    factors = {}
    for name, rank in plan.ranks.items():
        start = method.initialise(weight_of(model.get_submodule(name)), kept.get(name, {}), rank)
        factors[name] = LowRankFactors(start.up.float(), start.down.float())
    return factors
