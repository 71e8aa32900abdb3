"""Prefill and decode of every kind of checkpoint, in transformers and in vLLM: ratios to dense beside two ideals.

    OMP_NUM_THREADS=1 python benchmarks/serve.py [--dtype bfloat16] [--turns 3] [--server PYTHON_WITH_VLLM]

SmolLM2-135M. All kinds take turns on the same tokens. Seconds are of the processor, of one thread: other jobs of a
shared machine do not count. `times faster` is dense by kind in one turn: median (least to most). The ideals
are what time in proportion to multiplications, or to the bytes of the weights, would give. Weights that are not the
dense model's are drawn: no time depends on their values. `joined` has the `down`s of q, k, v and those
of gate, up as one product each; it is measured in memory and is no kind of checkpoint.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.quantised import load_torchao
from lowrank_kit.models.units import units_of
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.storage import Storage
from lowrank_kit.storages.two_factors import Factors

MODEL = "packaged://smollm2_135m"
SHAPES = ((1, 128), (8, 32))
IN_VLLM = Path(__file__).with_name("serve_in_vllm.py")

Seconds = dict[str, list[list[tuple[float, float]]]]
"""By kind and shape: prefill and decode of every turn."""


@torch.no_grad()
def main() -> None:
    arguments = _arguments()
    print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kinds: dict[str, Callable[[torch.dtype], PreTrainedModel]] = {
        "dense": dense,
        "factors, 0.2": partial(factored, storage=Factors(), ratio=0.2),
        "factors, 0.4": partial(factored, storage=Factors(), ratio=0.4),
        "pivot rows, 0.4": partial(factored, storage=Pivot(), ratio=0.4),
        "blocks removed, 0.4": partial(shorter, ratio=0.4),
        "channels removed, 0.4": partial(narrower, ratio=0.4),
    }
    models = {name: make(arguments.dtype).eval() for name, make in kinds.items()}
    with TemporaryDirectory() as folder:
        saved = {name: Path(folder, str(number)) for number, name in enumerate(models)}
        for name, model in models.items():
            save_compressed(model, saved[name])
        models["joined of factors, 0.4"] = joined(factored(arguments.dtype, Factors(), 0.4)).eval()
        for name in ("dense", "factors, 0.4"):
            models[f"int8 of {name}"] = load_torchao(str(saved[name]), None, 8, 32, arguments.dtype).eval()
        of = {
            name: [multiplies(model, n, arguments.new_tokens) for _, n in SHAPES]
            for name, model in models.items()
            if " of " not in name
        }
        bytes_of = {name: stored_bytes(model) for name, model in models.items()}
        title = f"{str(arguments.dtype).removeprefix('torch.')}, {arguments.turns} turns, {arguments.new_tokens} tokens"
        report(f"transformers, {title}", in_transformers(models, arguments.turns, arguments.new_tokens), of, bytes_of)
        if arguments.server:
            del models
            served = {name: (str(path), {}) for name, path in saved.items()}
            served["dense, by the Transformers backend"] = (str(saved["dense"]), {"model_impl": "transformers"})
            report(f"vLLM, {title}", in_vllm(arguments, served), of, bytes_of)


def dense(dtype: torch.dtype) -> PreTrainedModel:
    return load_model(ModelSource(MODEL), "causal", dtype).model


def factored(dtype: torch.dtype, storage: Storage, ratio: float) -> PreTrainedModel:
    """All linears of the blocks, each by the rank, in eights, that leaves nearest to ``1 - ratio`` of it."""
    model = dense(dtype)
    for ref in layout_of(model).linears:
        out, width = ref.out_features, ref.in_features
        rank = min(
            range(8, min(out, width), 8), key=lambda k: abs(storage.cost(out, width, k) - (1 - ratio) * out * width)
        )
        factors = LowRankFactors(torch.randn(out, rank) / rank**0.5, torch.randn(rank, width) / width**0.5)
        storage.put(model, [ref.name], LowRankFactors(factors.up.double(), factors.down.double()))
    return model


def shorter(dtype: torch.dtype, ratio: float) -> PreTrainedModel:
    model = dense(dtype)
    layout = layout_of(model)
    drop_blocks(model, layout, range(round((1 - ratio) * len(layout.blocks))))
    return model


def narrower(dtype: torch.dtype, ratio: float) -> PreTrainedModel:
    """Channels of the MLPs alone, in sixteens, until ``ratio`` of the blocks' linears is gone."""
    model = dense(dtype)
    layout = layout_of(model)
    whole = sum(ref.parameters for ref in layout.linears)
    for units in units_of(layout, range(len(layout.blocks))):
        if units.kind == "channels":
            each = sum(ref.parameters for ref in (*units.rows, *units.columns)) / units.count
            gone = 16 * round(ratio * whole / len(layout.blocks) / each / 16)
            keep_units(model, units, range(units.count - gone))
    return model


class PartOf(nn.Module):
    """``up`` of the outputs of a joined ``down`` that are this linear's."""

    def __init__(self, up: nn.Linear, first: int) -> None:
        super().__init__()
        self.up, self.first = up, first

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.narrow(-1, self.first, self.up.in_features))


def joined(model: PreTrainedModel) -> PreTrainedModel:
    """The same function: what enters attention or an MLP is the product of its first linears' stacked ``down``s."""
    for module in list(model.modules()):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if all(hasattr(module, name) for name in names):
                _join(module, names)
    return model


def _join(module: Any, names: Sequence[str]) -> None:
    layers = [getattr(module, name) for name in names]
    weight = torch.cat([layer.down.weight for layer in layers])
    module.entrance = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.entrance.weight.copy_(weight)
    first = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(module, name, PartOf(layer.up, first))
        first += layer.rank
    stock = type(module).forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock(self, self.entrance(hidden_states), *args, **kwargs)

    module.forward = MethodType(forward, module)


def in_transformers(models: Mapping[str, PreTrainedModel], turns: int, new_tokens: int) -> Seconds:
    found: Seconds = {name: [] for name in models}
    for batch, prompt in SHAPES:
        tokens = torch.randint(1000, (batch, prompt + new_tokens))
        taken = {name: [] for name in models}
        for turn in range(1 + turns):
            for name, model in models.items():
                seconds = _timed(model, tokens, prompt)
                if turn:
                    taken[name].append(seconds)
        for name in models:
            found[name].append(taken[name])
    return found


def _timed(model: PreTrainedModel, tokens: Tensor, prompt: int) -> tuple[float, float]:
    clock = [time.process_time()]
    cache = model(input_ids=tokens[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    clock.append(time.process_time())
    for column in tokens[:, prompt:].split(1, dim=1):
        model(input_ids=column, past_key_values=cache, use_cache=True, logits_to_keep=1)
    clock.append(time.process_time())
    return clock[1] - clock[0], clock[2] - clock[1]


def multiplies(model: PreTrainedModel, prompt: int, new_tokens: int) -> tuple[float, float]:
    """Per token of prefill, whose last position alone has logits, and of decode: linears, attention, head."""
    layout = layout_of(model)
    linears = sum(part.parameters for ref in layout.linears for part in ref.parts)
    # Scores and their sums of values: a token looks at those before it.
    each = sum(2 * ref.out_features for ref in layout.linears if ref.role == "q")
    head = model.lm_head.weight.numel()
    prefill = linears + each * (prompt + 1) / 2 + head / prompt
    return prefill, linears + each * (prompt + (new_tokens + 1) / 2) + head


def in_vllm(arguments: argparse.Namespace, models: Mapping[str, tuple[str, dict[str, str]]]) -> Seconds:
    """The same by the server's own Python, on one thread."""
    job = {"models": models, "shapes": SHAPES, "turns": arguments.turns, "new_tokens": arguments.new_tokens}
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [arguments.server, str(IN_VLLM)],
        input=json.dumps(job),
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(title: str, seconds: Seconds, multiplied: Mapping[str, Any], bytes_of: Mapping[str, int]) -> None:
    """Print a table a phase: what every kind is times faster than dense at every shape, beside the ideals."""
    for number, phase in enumerate(("prefill", "decode")):
        print(f"\n## {phase}, {title}\n")
        heads = [f"{batch} x {prompt}, times faster | ideal" for batch, prompt in SHAPES]
        print(f"| kind | {' | '.join(heads)} | ideal by bytes |")
        print("|---" * (2 + 2 * len(SHAPES)) + "|")
        for name, found in seconds.items():
            # The Transformers backend of vLLM runs the same model.
            kind = name.partition(", by")[0]
            cells = []
            for shape, turns in enumerate(found):
                ratios = [
                    slow[number] / fast[number] for slow, fast in zip(seconds["dense"][shape], turns, strict=True)
                ]
                # Joined factors and whole numbers are multiplied as often as what they are of.
                costs = [multiplied[of][shape][number] for of in ("dense", kind.partition(" of ")[2] or kind)]
                cells.append(
                    f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {costs[0] / costs[1]:.2f}"
                )
            print(f"| {name} | {' | '.join(cells)} | {bytes_of['dense'] / bytes_of[kind]:.2f} |")
        ms = [f"{1e3 * median(turn[number] for turn in turns):.0f}" for turns in seconds["dense"]]
        print(f"\nDense: {', '.join(ms)} ms of the processor.", flush=True)


def stored_bytes(model: PreTrainedModel) -> int:
    """Of the parameters, those of quantised ones by the tensors that they consist of."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--server", metavar="PYTHON", help="a Python that has vLLM: measure there too")
    return parse_study(parser)


if __name__ == "__main__":
    main()
