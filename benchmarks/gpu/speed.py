"""Reading and generating, dense and compressed, by batch and length: times faster, beside what could be.

Models of Llama-2-7B's widths and eight blocks, in bfloat16. `times faster` is dense by compressed, in the same run; the
ideals are what time in proportion to multiplications gives (prefill) and time in proportion to the bytes of the weights
(decode). Compiled prefill is `torch.compile` of the model without a cache; compiled decode is what `generate` does with
a static cache.
"""

import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from part import Figures, Part
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.config import SpeedConfig
from lowrank_kit.evaluation.speed import ideal_speedup, measure_speed, speedup
from lowrank_kit.models.factored import replace_by_pivots, replace_linear
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.rounded import round_linear
from lowrank_kit.models.units import units_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.pivots import PivotFactors
from lowrank_kit.spectral.rounding import Rounding

BLOCKS = 8


def main() -> None:
    part = Part(__doc__ or "")
    kinds: dict[str, Callable[[Part], PreTrainedModel]] = {
        "factors, 0.2": partial(factored, ratio=0.2),
        "pivots, 0.2": partial(by_pivots, ratio=0.2),
        "factors, 0.4": partial(factored, ratio=0.4),
        "narrower, 0.2": partial(narrower, ratio=0.2),
        "int8": rounded,
    }
    for name, make in kinds.items():
        part.measure(name, partial(against_dense, part, make))
    for name in ("factors, 0.2", "pivots, 0.2", "int8"):
        part.measure(f"{name}, compiled", partial(compiled, part, kinds[name]))
    part.measure("dense, compiled", partial(compiled, part, dense))
    part.finish()


@torch.no_grad()
def against_dense(part: Part, make: Callable[[Part], PreTrainedModel]) -> Figures:
    """Both phases at every shape, eager."""
    models = {"dense": dense(part), "compressed": make(part)}
    found: Figures = {}
    for batch, length in part.pick(((1, 512), (8, 512), (8, 2048), (64, 128)), ((1, 8), (2, 16))):
        settings = SpeedConfig(
            batch_size=batch, prompt_tokens=length, new_tokens=part.pick(32, 2), repeats=part.pick(5, 2)
        )
        speeds = measure_speed(models, settings, part.device)
        slow, fast = speeds["dense"], speeds["compressed"]
        bytes_of_weights = {name: held(model) for name, model in models.items()}
        found[f"{batch} x {length}"] = {
            "prefill, tokens a second": [slow.prefill_tokens_per_second, fast.prefill_tokens_per_second],
            "decode, tokens a second": [slow.decode_tokens_per_second, fast.decode_tokens_per_second],
            "times faster": speedup(slow, fast),
            "ideal by multiplications": ideal_speedup(slow, fast),
            "ideal by bytes": bytes_of_weights["dense"] / bytes_of_weights["compressed"],
            "peak extra MiB": [slow.peak_extra_bytes / 2**20, fast.peak_extra_bytes / 2**20],
        }
    models.clear()
    gc.collect()
    return found


@torch.no_grad()
def compiled(part: Part, make: Callable[[Part], PreTrainedModel]) -> Figures:
    """Seconds of a prefill of 8 x 512 tokens, and of 32 tokens that `generate` adds to it one by one."""
    model, tokens = make(part), part.windows(*part.pick((8, 512), (2, 16))).to(part.device)
    forward = torch.compile(model.model, dynamic=False)
    prefill = timed(part, lambda: forward(input_ids=tokens, use_cache=False), 5)
    options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}

    def generate(count: int) -> Callable[[], object]:
        return lambda: model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options)

    decode = timed(part, generate(33), 2) - timed(part, generate(1), 2)
    torch.compiler.reset()
    return {"prefill": prefill, "decode": decode}


def timed(part: Part, work: Callable[[], object], repeats: int) -> float:
    """Median seconds; the first two rounds compile and do not count."""
    seconds = []
    for _ in range(2 + repeats):
        part.synchronise()
        started = perf_counter()
        work()
        part.synchronise()
        seconds.append(perf_counter() - started)
    return median(seconds[2:])


def held(model: nn.Module) -> int:
    """Bytes that a token reads of it: all weights and codes but the embedding's, of which it reads a row."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) - model.get_input_embeddings().weight.nbytes


def rank_of(ref: LinearRef, ratio: float) -> int:
    """The rank of two factors that leaves this share of the parameters, in whole eights."""
    return max(8, int((1 - ratio) * ref.parameters / (ref.out_features + ref.in_features)) // 8 * 8)


def dense(part: Part) -> PreTrainedModel:
    """The model as it is."""
    return part.llama(part.pick(BLOCKS, 2))


def factored(part: Part, ratio: float) -> PreTrainedModel:
    """Every linear as two random factors."""
    model = part.llama(part.pick(BLOCKS, 2))
    for ref in layout_of(model).linears:
        rank = rank_of(ref, ratio)
        replace_linear(
            model, ref.name, LowRankFactors(drawn(part, ref.out_features, rank), drawn(part, rank, ref.in_features))
        )
    return model


def by_pivots(part: Part, ratio: float) -> PreTrainedModel:
    """Every linear by rows of it, of the rank that as many parameters buy."""
    model = part.llama(part.pick(BLOCKS, 2))
    for ref in layout_of(model).linears:
        out, width, left = ref.out_features, ref.in_features, (1 - ratio) * ref.parameters
        rank = int((out + width - ((out + width) ** 2 - 4 * left) ** 0.5) / 2) // 8 * 8
        index = torch.randperm(out, device=part.device)
        replace_by_pivots(model, ref.name, PivotFactors(drawn(part, rank, width), drawn(part, out - rank, rank), index))
    return model


def narrower(part: Part, ratio: float) -> PreTrainedModel:
    """Fewer heads and channels, as pruning leaves them: stock linears of other widths."""
    model = part.llama(part.pick(BLOCKS, 2))
    layout = layout_of(model)
    for units in units_of(layout, range(len(layout.blocks))):
        keep_units(model, units, range(max(1, int((1 - ratio) * units.count))))
    return model


def rounded(part: Part) -> PreTrainedModel:
    """Every linear of eight-bit codes, multiplied out for every pass."""
    model = part.llama(part.pick(BLOCKS, 2))
    for ref in layout_of(model).linears:
        round_linear(model, ref.name, Rounding(8, 0))
    return model


def drawn(part: Part, *shape: int) -> Tensor:
    """Random numbers that keep the length of what they are multiplied with."""
    return torch.randn(shape, device=part.device, dtype=torch.bfloat16) / shape[-1] ** 0.5


if __name__ == "__main__":
    main()
