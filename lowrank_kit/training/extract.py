"""A LoRA out of a full fine-tune: of every matrix's difference the best product of low rank.

With D = W_tuned - W_base, rank k keeps the k largest singular components of D; where text is given, of ``D C^(1/2)``
with C the second moment of what the tuned model's layer reads: the least error of its outputs
(`lowrank_kit.spectral.truncate`). What else changed (norms, embeddings, biases, a causal model's head) no LoRA holds;
it is told apart. A classifier's head travels with the adapter as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.whole import Head
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.allocate import spend
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import output_projection
from lowrank_kit.training.adapters import AdaptedModel, attach

LORA = Lora(name="lora")


@dataclass(frozen=True)
class Wanted:
    """How many components a matrix keeps.

    ``rank``; or as many as hold this share of its difference's ``energy``; or what it gets of a common budget of
    ``parameters``, which goes to the components that hold most energy a parameter.
    """

    rank: int | None = None
    energy: float | None = None
    parameters: int | None = None

    def of(self, values: Float64[Tensor, " p"], price: int) -> int:
        """Components of a matrix, of a common budget at most; 0 where nothing changed.

        ``values`` are squared singular values, descending; ``price`` is the parameters of a component.
        """
        total = float(values.sum())
        if total <= 0:
            return 0
        if self.energy is not None:
            return min(int((values.cumsum(0) < self.energy * total).sum()) + 1, len(values))
        most = self.rank if self.parameters is None else self.parameters // price
        return min(most or 0, int((values > 0).sum()))

    def shared(self, values: Mapping[str, Float64[Tensor, " p"]], prices: Mapping[str, int]) -> dict[str, int]:
        """Ranks by name: of every matrix's components these are the first.

        Raises `LowRankKitError` for a budget that no component fits.
        """
        if self.parameters is None:
            return {name: len(found) for name, found in values.items()}
        options = [range(0, prices[name] * len(found) + 1, prices[name]) for name, found in values.items()]
        listed = [(found / prices[name]).tolist() for name, found in values.items()]
        taken = spend([0] * len(options), options, self.parameters, lambda item, n: listed[item][n])
        if not any(taken):
            raise LowRankKitError(
                f"{self.parameters} parameters are fewer than one component has: the least is {min(prices.values())}"
            )
        return dict(zip(values, taken, strict=True))


@dataclass(frozen=True)
class Extraction:
    """The adapter, the share of every matrix's difference that it leaves out, and what else differs, by name.

    ``left`` is in the metric that the components were chosen by; ``elsewhere`` are norms of the differences over
    those of the tensors.
    """

    adapted: AdaptedModel
    left: Mapping[str, float]
    elsewhere: Mapping[str, float]


@torch.no_grad()
def extract(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    wanted: Wanted,
    samples: CalibrationSamples | None = None,
    new_modules: Sequence[str] = (),
) -> Extraction:
    """Put the difference of two models into a LoRA on the first, which is changed in place.

    Args:
        base: the model that was fine-tuned, as it was before.
        tuned: the same afterwards.
        wanted: components a matrix.
        samples: what the tuned model reads, for components of the outputs; None: of the weights.
        new_modules: modules that the base's checkpoint lacks; the tuned ones are saved with the adapter.

    Raises `LowRankKitError` for models of different shapes, and for those whose linears are equal.
    """
    # Of experts that are one parameter, no adapter holds a change.
    targets = LORA.targets(layout_of(tuned))
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (base, tuned)]
    if shapes[0] != shapes[1]:
        name = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise LowRankKitError(
            f"these are not one model before and after: {name} is {shapes[0].get(name)} in the base and "
            f"{shapes[1].get(name)} in the fine-tuned one; give the model that it was trained from"
        )

    def difference(ref: LinearRef) -> Float64[Tensor, "out in"]:
        now, before = (weight_of(model.get_submodule(ref.name)).detach().double() for model in (tuned, base))
        return now - before

    def keep(ref: LinearRef, inputs: Moments) -> Kept:
        changed = difference(ref)
        projection = output_projection(changed, inputs)
        rank = wanted.of(projection.values, sum(changed.shape))
        up, down = projection.factors(changed, rank)
        return {"up": up, "down": down, "values": projection.values[:rank], "total": projection.values.sum()}

    def keep_of(layer: LayerStatistics) -> Kept:
        return keep(layer.ref, layer.moments)

    if samples is None:
        found = {ref.name: keep(ref, _identity(ref.in_features)) for ref in targets}
    else:
        found = calibrate(tuned, samples, targets, Reduction(StatisticsRequest(moments="input"), keep_of))
    found = {name: kept for name, kept in found.items() if kept["total"] > 0}
    if not found:
        raise LowRankKitError("no matrix of the fine-tuned model differs from the base: there is nothing to extract")
    prices = {name: kept["up"].shape[0] + kept["down"].shape[1] for name, kept in found.items()}
    ranks = wanted.shared({name: kept["values"] for name, kept in found.items()}, prices)
    factors = {
        name: LowRankFactors(found[name]["up"][:, :rank], found[name]["down"][:rank])
        for name, rank in ranks.items()
        if rank
    }
    left = {name: float(1 - kept["values"][: ranks[name]].sum() / kept["total"]) for name, kept in found.items()}
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    adapted = _adapter(base, factors, new_modules)
    for name in adapted.new_modules:
        saved = adapted.model.get_base_model().get_submodule(name).modules_to_save["default"]
        saved.load_state_dict(tuned.get_submodule(name).state_dict())
    held = tuple(f"{name}." for name in adapted.new_modules)
    elsewhere = {
        name: float((now - before[name]).norm() / before[name].norm())
        for name, now in tuned.named_parameters()
        if name.removesuffix(".weight") not in found and not name.startswith(held) and not now.equal(before[name])
    }
    return Extraction(adapted, left, elsewhere)


def _identity(size: int) -> Moments:
    return Moments(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 1)


@torch.no_grad()
def _adapter(base: PreTrainedModel, factors: Mapping[str, LowRankFactors], new_modules: Sequence[str]) -> AdaptedModel:
    layout = layout_of(base)
    ranks = {name: product.down.shape[0] for name, product in factors.items()}
    plan = Plan("extract", ranks, tuple(range(len(layout.blocks))), layout.parameters, layout.parameters)
    is_classifier = type(base).__name__.endswith("ForSequenceClassification")
    heads = [layout.head] if is_classifier and layout.head else []
    saved = tuple(dict.fromkeys([*new_modules, *heads]))
    adapted = attach(base, LORA, plan, {}, saved, "SEQ_CLS" if is_classifier else "CAUSAL_LM")
    for name, product in factors.items():
        layer = adapted.layer(name)
        layer.lora_A["default"].weight.copy_(product.down)
        layer.lora_B["default"].weight.copy_(product.up)
    return adapted


def write_extraction(
    base: str, tuned: Path, output: Path, wanted: Wanted, texts: Path | None = None
) -> tuple[Extraction, int]:
    """Read both models, write the adapter to ``output``; also returns the number of parameters of its factors.

    Args:
        base: hub id, folder or packaged model that ``tuned`` was trained from.
        tuned: checkpoint folder of a causal model or a sequence classifier.
        output: folder for the adapter.
        wanted: components a matrix.
        texts: a text file that the tuned model reads in windows of 512 tokens, 32 at most.

    Raises `LowRankKitError` as `extract` and `load_model`.
    """
    from lowrank_kit.models.load import ModelSource, load_config, load_model, load_tokenizer, local_path

    config = load_config(ModelSource(str(tuned)))
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    head: Head = "classification" if is_classifier else "causal"
    labels = config.num_labels if is_classifier else None
    now = load_model(ModelSource(str(tuned)), head, num_labels=labels).model.eval()
    before = load_model(ModelSource(base), head, num_labels=labels)
    samples = None
    if texts is not None:
        ids = torch.tensor(load_tokenizer(ModelSource(str(tuned)))(texts.read_text(), verbose=False)["input_ids"])
        samples = CalibrationSamples(tuple({"input_ids": window} for window in ids.split(512)[:32]), batch_size=1)
    found = extract(before.model.eval(), now, wanted, samples, before.new_modules)
    found.adapted.export(output, local_path(ModelSource(base)))
    sizes = (found.adapted.factors(name) for name in found.adapted.plan.ranks)
    return found, sum(product.up.numel() + product.down.numel() for product in sizes)
