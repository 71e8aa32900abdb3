"""SVD-LLM as lowrank_kit does it against the procedure as published: time, memory and perplexity in one run.

    python benchmarks/compress.py [--repeats 3] [--samples 32] [--seq-len 1024] [--threads 2] [--data-root DIR]
    python benchmarks/compress.py --profile [--blocks 4 --samples 4 --seq-len 512]

Both compress SmolLM2-135M (float32), every linear of its blocks at one uniform ratio, on the same calibration
windows of running text. The published procedure (arXiv 2403.07378 and its released code) sums a Gram matrix for every
module over the whole forward pass, one window at a time; takes its Cholesky factor S in float64, after a shift of the
diagonal where that fails; the inverse of S in float64; and a full float32 SVD of W S. Every measurement is a fresh
process that loads the model first; what is measured begins after that: wall seconds, and peak resident memory above
what the loaded model took. The two alternate, so that a drift of the machine's speed hits both. Ours then goes on to
the further ratios with the decomposition it has cached, loading the model again each time (counted).

Perplexity, of windows of 1024 tokens, is that of the first ratio on text that nobody calibrated on. `--blocks` cuts
the model, for a quick look; perplexities then mean nothing. `--profile` shows where our time goes, by function.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fresh import SMOLLM2, PeakMemory, Run, in_fresh_process, smollm2
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.assets import require
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.data.sources import DatasetRef, LocalSource, PackagedSource
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import load_tokenizer
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.truncations.decompose import Request
from lowrank_kit.truncations.optimal import Optimal

PERPLEXITY_WINDOW = 1024
FORWARD, DECOMPOSITION, CACHE, FACTORS = "forward and Grams", "decomposition", "cache", "factors"


def main() -> None:
    arguments = _arguments()
    if not arguments.measure:
        print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps({"ours": measure_ours, "published": measure_published}[arguments.measure](arguments)))
    elif arguments.profile:
        profile(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run both as often as asked and print a markdown report."""
    runs: dict[str, list[Run]] = {"ours": [], "published": []}
    for _ in range(arguments.repeats):
        for name, found in runs.items():
            found.append(in_fresh_process(name, arguments))
    text = "packaged Wikipedia text" if arguments.data_root is None else "WikiText-2"
    print(f"{arguments.samples} x {arguments.seq_len} tokens of {text}, {arguments.threads} threads, "
          f"ratio {arguments.ratios[0]}, {arguments.repeats} runs each; medians (least to most)\n")  # fmt: skip
    phases = [FORWARD, DECOMPOSITION, CACHE, FACTORS]
    print("|  | seconds |", " | ".join(phases), "| extra memory, MiB | share of the model | perplexity |")
    print("|---" * (len(phases) + 5) + "|")
    for name, found in runs.items():
        columns = [_spread([run["seconds"] for run in found])]
        columns += [f"{statistics.median(run['phases'].get(phase, 0.0) for run in found):.1f}" for phase in phases]
        columns.append(_spread([run["extra_bytes"] / 2**20 for run in found], 0))
        columns.append(_spread([100 * run["extra_bytes"] / run["model_bytes"] for run in found], 0) + " %")
        columns.append(f"{found[0]['perplexity']:.3f}")
        print(f"| {name} | " + " | ".join(columns) + " |")
    pairs = list(zip(runs["ours"], runs["published"], strict=True))
    times = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    sweep = [ours["sweep_seconds"] / ours["seconds"] for ours, _ in pairs]
    memory = [theirs["extra_bytes"] / ours["extra_bytes"] for ours, theirs in pairs]
    decomposition = [p["phases"][DECOMPOSITION] / o["phases"][DECOMPOSITION] for o, p in pairs]
    print(f"\npublished / ours, time: {_spread(times, 2)}; decomposition alone: {_spread(decomposition, 2)}")
    print(f"published / ours, extra memory: {_spread(memory, 2)}")
    print(f"ours, ratios {arguments.ratios} / ratio {arguments.ratios[0]}, time: {_spread(sweep, 2)}")
    shifted = runs["published"][0]["shifted"]
    print(f"published: {shifted} Cholesky factorisations failed until the diagonal was shifted")


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            # Its calls return before their work is done.
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started

    def calls_of(self, owner: type, name: str, phase: str) -> AbstractContextManager[object]:
        """Count all calls of a method to a phase while entered."""
        original: Callable[..., object] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> object:
            with self(phase):
                return original(*args, **kwargs)

        return mock.patch.object(owner, name, timed)


def measure_ours(arguments: argparse.Namespace) -> Run:
    calibration, held_out = _windows(arguments)
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in calibration), batch_size=arguments.batch_size)
    first, *others = arguments.ratios
    model, clock = smollm2(arguments.blocks), Clock()
    model_bytes = _bytes(model)
    with tempfile.TemporaryDirectory() as cache:
        with PeakMemory() as memory, clock("all"):
            compress(model, svd_llm(first), samples, Path(cache), clock)
        phases = dict(clock.seconds)
        seconds = phases.pop("all")
        judged = perplexity(model, held_out)
        with clock("all"):
            for ratio in others:
                # Not two models at once.
                del model
                model = smollm2(arguments.blocks)
                compress(model, svd_llm(ratio), samples, Path(cache), Clock())
    phases[FORWARD] -= phases[DECOMPOSITION] + phases[CACHE]
    return {
        "seconds": seconds,
        "phases": phases,
        "sweep_seconds": clock.seconds["all"],
        "extra_bytes": memory.extra_bytes,
        "model_bytes": model_bytes,
        "perplexity": judged.value,
    }


def svd_llm(ratio: float) -> TruncatedSVD:
    return TruncatedSVD(name="svd_llm", truncation=Optimal(), allocation=Uniform(), ratio=ratio, rank_multiple=1)


def compress(
    model: PreTrainedModel, method: TruncatedSVD, samples: CalibrationSamples, cache: Path, clock: Clock
) -> PreTrainedModel:
    """Compress a model in place as a run of the pipeline does."""
    work = Compression(method, Context(model, layout_of(model), samples, cache))
    in_decomposition = clock.calls_of(Request, "decomposed", DECOMPOSITION)
    in_save = clock.calls_of(CalibrationStore, "save", CACHE)
    with clock(FORWARD), in_decomposition, in_save:
        work.calibrate()
    with clock(FACTORS):
        return work.apply(work.plan())


def measure_published(arguments: argparse.Namespace) -> Run:
    calibration, held_out = _windows(arguments)
    model, clock = smollm2(arguments.blocks), Clock()
    model_bytes = _bytes(model)
    with PeakMemory() as memory, clock("all"):
        shifted = compress_as_published(model, calibration, arguments.ratios[0], clock)
    phases = dict(clock.seconds)
    return {
        "seconds": phases.pop("all"),
        "phases": phases,
        "extra_bytes": memory.extra_bytes,
        "model_bytes": model_bytes,
        "perplexity": perplexity(model, held_out).value,
        "shifted": shifted,
    }


@torch.no_grad()
def compress_as_published(model: PreTrainedModel, windows: Tensor, ratio: float, clock: Clock) -> int:
    """Compress a model in place; return how many Gram matrices had to be shifted to be positive definite."""
    names = [ref.name for ref in layout_of(model).linears]
    shifted = 0
    with clock(FORWARD):
        profile = _grams_of_every_module(model, names, windows)
    with clock(DECOMPOSITION):
        for name in names:
            profile[name], failed = _cholesky(profile[name].double())
            shifted += failed
    for name in names:
        root, weight = profile[name], model.get_submodule(name).weight
        with clock(DECOMPOSITION):
            inverse = torch.linalg.inv(root).float()
            u, s, vh = torch.linalg.svd(weight @ root.float(), full_matrices=False)
            out_features, in_features = weight.shape
            rank = int(out_features * in_features * (1 - ratio) / (out_features + in_features))
            half = s[:rank].sqrt()
            up, down = u[:, :rank] * half, half[:, None] * (vh[:rank] @ inverse)
        with clock(FACTORS):
            replace_linear(model, name, LowRankFactors(up, down))
    return shifted


def _grams_of_every_module(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor, name: str = name) -> None:
            gram = (inputs[0].transpose(1, 2) @ inputs[0]).sum(0)
            grams[name] = grams[name] + gram if name in grams else gram

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for ids in windows:
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def _cholesky(gram: Tensor) -> tuple[Tensor, bool]:
    root, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return root, False
    gram.diagonal().add_(1e-6 - torch.linalg.eigvalsh(gram)[0])
    return torch.linalg.cholesky(gram), True


def profile(arguments: argparse.Namespace) -> None:
    """Print where our time goes; products written with an operator count to the function that has them."""
    calibration, _ = _windows(arguments)
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in calibration), batch_size=arguments.batch_size)
    model, clock, profiler = smollm2(arguments.blocks), Clock(), cProfile.Profile()
    with tempfile.TemporaryDirectory() as cache, profiler:
        compress(model, svd_llm(arguments.ratios[0]), samples, Path(cache), clock)
    clock.seconds[FORWARD] -= clock.seconds[DECOMPOSITION] + clock.seconds[CACHE]
    print("; ".join(f"{phase} {seconds:.1f} s" for phase, seconds in clock.seconds.items()))
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(20)


def _windows(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Calibration windows, and windows of another part of the text to judge on."""
    source = PackagedSource() if arguments.data_root is None else LocalSource(arguments.data_root)
    text = DatasetRef("text/wikipedia" if arguments.data_root is None else "text/wikitext2")
    tokenizer = load_tokenizer(SMOLLM2)

    def windows(split: str, count: int, length: int) -> Tensor:
        rows = source.load(text, split).dataset["text"]
        ids = torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"])
        if len(ids) < count * length:
            sys.exit(f"'{split}' has {len(ids)} tokens, fewer than {count} x {length}")
        return ids[: count * length].view(count, length)

    calibration = windows("validation", arguments.samples, arguments.seq_len)
    return calibration, windows("test", arguments.perplexity_windows, PERPLEXITY_WINDOW)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _spread(values: list[float], digits: int = 1) -> str:
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f} ({least} to {most})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows a batch, ours only")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=0, help="use the first so many blocks; 0: all")
    parser.add_argument("--perplexity-windows", type=int, default=8)
    parser.add_argument("--data-root", type=Path, help="folder with text/wikitext2, as for data=local")
    parser.add_argument("--profile", action="store_true", help="show where our time goes instead")
    parser.add_argument("--measure", choices=["ours", "published"], help=argparse.SUPPRESS)
    require("smollm2_135m")
    return parse_study(parser)


if __name__ == "__main__":
    main()
