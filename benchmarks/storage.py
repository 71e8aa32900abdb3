"""Two factors against pivot rows: products of equal bytes, and what bfloat16 rounds off at equal rank.

    python benchmarks/storage.py [--repeats 9] [--threads 1] [--dtype float32]
    python benchmarks/storage.py --rounding packaged://smollm2_135m TEXT_FILE

The first takes turns between the dense matrix and both storages of it, all with random weights: a shape, the share of
its parameters that is kept, and one token (decode) or 512 (prefill). The ratios are to the dense matrix of the same
turn. The second truncates every matrix of the model to a share of its parameters for the inputs that it has on the
text, and compares outputs in bfloat16 with those of the same product in float64: relative root mean squares, beside
what the truncation itself loses; `columns` is the transposed form, k columns and the coefficients of the others.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model, local_path
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.pivots import pivoted
from lowrank_kit.spectral.truncate import output_projection
from lowrank_kit.storages.storage import Storage

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)]
TOKENS = {"decode": 1, "prefill": 512}
KEPT = (0.8, 0.4)


@torch.no_grad()
def main() -> None:
    arguments = _arguments()
    print(in_words(arguments.provenance), end="\n\n")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.rounding:
        report_rounding(*arguments.rounding)
    else:
        report_speed(arguments.dtype, arguments.repeats)


def report_speed(dtype: torch.dtype, repeats: int) -> None:
    """Print a row for every shape, share and number of tokens: median ratio to dense, (least to most)."""
    print(f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, {repeats} turns: "
          "times faster than dense, median (least to most)\n")  # fmt: skip
    print("| shape | kept | tokens | ranks | factors | pivot |\n|---|---|---|---|---|---|")
    for out, width in SHAPES:
        for kept in KEPT:
            dense = nn.Linear(width, out, bias=False, dtype=dtype)
            layers = {name: _stored(storage(), dense, kept) for name, storage in sorted(Storage.known.items())}
            for phase, tokens in TOKENS.items():
                x = torch.randn(tokens, width, dtype=dtype)
                seconds = _in_turn({"dense": dense} | layers, x, repeats)
                found = {name: [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)] for name in layers}
                shown = " | ".join(_spread(ratios) for ratios in found.values())
                ranks = ", ".join(str(layer.rank) for layer in layers.values())
                print(f"| {out} x {width} | {kept} | {phase} | {ranks} | {shown} |", flush=True)


def _stored(storage: Storage, dense: nn.Linear, kept: float) -> nn.Module:
    """A layer of the largest rank that this share of the parameters buys."""
    out, width = dense.weight.shape
    rank = max(k for k in range(1, min(out, width)) if storage.cost(out, width, k) <= kept * out * width)
    holder = nn.ModuleDict({"layer": nn.Linear(width, out, bias=False, dtype=dense.weight.dtype)})
    storage.put(holder, ["layer"], LowRankFactors(torch.randn(out, rank).double(), torch.randn(rank, width).double()))
    return holder["layer"]


def _in_turn(layers: dict[str, nn.Module], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of so many passes as take about a twentieth of a second; one turn goes before those that count."""
    seconds = defaultdict(list)
    passes = {name: _enough(partial(layer, x)) for name, layer in layers.items()}
    for turn in range(1 + repeats):
        for name, layer in layers.items():
            started = time.perf_counter()
            for _ in range(passes["dense"]):
                layer(x)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _enough(work: Callable[[], Tensor]) -> int:
    work()
    started = time.perf_counter()
    work()
    return max(1, int(0.05 / (time.perf_counter() - started)))


@torch.no_grad()
def report_rounding(path: str, text: str) -> None:
    """Print the rounding of every form over all matrices of a model, at two shares kept."""
    model = load_model(ModelSource(path), "causal").model
    tokenizer = AutoTokenizer.from_pretrained(local_path(ModelSource(path)))
    ids = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: min(len(ids) // 512, 8) * 512].view(-1, 512)
    reads: dict[str, list[Tensor]] = defaultdict(list)
    refs = layout_of(model).linears
    for ref in refs:
        module = model.get_submodule(ref.name)
        module.register_forward_pre_hook(lambda _, read, name=ref.name: reads[name].append(read[0].flatten(0, 1)))
    model(ids)
    found: dict[tuple[float, str], list[float]] = defaultdict(list)
    for ref in refs:
        weight = model.get_submodule(ref.name).weight.double()
        inputs = torch.cat(reads.pop(ref.name)).bfloat16()
        moments = Moments.zeros(ref.in_features, inputs.device)
        moments.update(inputs.float())
        projection = output_projection(weight, moments)
        for kept in KEPT:
            rank = int(kept * ref.parameters / (ref.out_features + ref.in_features))
            factors = projection.factors(weight, rank)
            for form, error in _rounding(factors, weight, inputs).items():
                found[kept, form].append(error)
    print(f"{path}: {len(refs)} matrices, {ids.numel()} tokens of {Path(text).name}; relative, in per cent\n")
    print("| kept | form | root mean square | worst matrix |\n|---|---|---|---|")
    for (kept, form), errors in found.items():
        mean = statistics.fmean(error**2 for error in errors) ** 0.5
        print(f"| {kept} | {form} | {100 * mean:.2f} | {100 * max(errors):.2f} |")


def _rounding(factors: LowRankFactors, weight: Tensor, inputs: Tensor) -> dict[str, float]:
    """Of one product: relative error of its outputs by every form in bfloat16, and what is lost by truncation."""
    exact = inputs.double() @ factors.dense().T
    holder = nn.ModuleDict({name: nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16) for name in "ab"})
    holder["dense"] = nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16)
    holder["dense"].weight.copy_(factors.dense())
    replace_linear(holder, "a", factors)
    Storage.known["pivot"]().put(holder, ["b"], factors)
    columns = pivoted(LowRankFactors(factors.down.T, factors.up.T))
    order = columns.index.argsort()
    chosen, others = inputs[:, order].split([factors.rank, len(order) - factors.rank], -1)
    between = chosen + others @ columns.coefficients.bfloat16()
    outputs = {
        "dense": holder["dense"](inputs),
        "factors": holder["a"](inputs),
        "pivot": holder["b"](inputs),
        "columns": between @ columns.rows.bfloat16(),
    }
    lost = inputs.double() @ weight.T
    errors = {form: float((y.double() - exact).norm() / exact.norm()) for form, y in outputs.items()}
    return errors | {"truncation": float((exact - lost).norm() / lost.norm())}


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounding", nargs=2, metavar=("MODEL", "TEXT_FILE"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    return parse_study(parser)


if __name__ == "__main__":
    main()
