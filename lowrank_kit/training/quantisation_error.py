"""The low-rank correction of a quantised model: what quantisation took from its outputs, as far as a LoRA can hold it.

With E = W - Q(W) and C the second moment of the original's inputs, ``U V`` of rank k minimises ``|(E - U V) C^(1/2)|``,
which is the optimal truncation of E: no weight is trained. QERA (arXiv 2410.06040) has this optimum as its exact
solution, by the symmetric root of C. EoRA (arXiv 2410.21271) takes the SVD of ``E Q L^(1/2)`` with C = Q L Q^T and
projects back: ``Q L^(1/2) = C^(1/2) Q`` is the same root up to a rotation, which changes no norm, so that it is the
same optimum, whatever factor C is scaled by. LQER (arXiv 2402.02446) has a diagonal in the place of C.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from transformers import PreTrainedModel

from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.truncate import output_projection


def error_factors(
    model: PreTrainedModel,
    quantised: PreTrainedModel,
    samples: CalibrationSamples,
    rank: int,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, LowRankFactors]:
    """Return the best product of this rank for what the quantised model's linears lack, by name, in float32.

    The first k components of it are the best of rank k.

    Args:
        model: the original.
        quantised: the same with quantised weights in its blocks (`models.quantised.load_torchao`).
        samples: calibration samples, which the original reads.
        rank: components; a matrix with a smaller side has so many, and zeros.
        cache: folder of the content-keyed cache; None keeps nothing on disk.
        progress: shows one bar over the blocks.

    Raises `LowRankKitError` for a model of which no linear is quantised.
    """
    from torchao.utils import TorchAOBaseTensor

    refs = [
        ref
        for ref in layout_of(quantised).linears
        if not ref.packed and isinstance(quantised.get_submodule(ref.name).weight.data, TorchAOBaseTensor)
    ]
    if not refs:
        raise LowRankKitError(
            f"no linear of this {quantised.config.model_type} is quantised: torchao quantises torch.nn.Linear alone"
        )

    def keep(layer: LayerStatistics) -> Kept:
        weight, rounded = (holder.get_submodule(layer.ref.name).weight for holder in (model, quantised))
        error = weight.double() - rounded.dequantize().to(weight.device, torch.float64)
        up, down = output_projection(error, layer.moments).factors(error, rank)
        return {"up": up.float(), "down": down.float()}

    kind = str(quantised.config.quantization_config.to_dict())
    reduction = Reduction(StatisticsRequest(moments="input"), keep, depends_on={"quantised": kind, "rank": rank})
    found = calibrate(model, samples, refs, reduction, cache=cache, progress=progress)
    return {name: LowRankFactors(kept["up"], kept["down"]) for name, kept in found.items()}


@torch.no_grad()
def with_correction(quantised: PreTrainedModel, factors: Mapping[str, LowRankFactors], rank: int) -> PeftModel:
    """Put the first ``rank`` components into the quantised model as a LoRA of scale 1; the base is changed in place."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors), task_type="CAUSAL_LM")
    adapted = get_peft_model(quantised, config)
    for name, product in factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(product.down[:rank])
        layer.lora_B["default"].weight.copy_(product.up[:, :rank])
    return adapted.eval()
