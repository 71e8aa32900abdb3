"""Prefill of a compressed checkpoint against its dense base: how much faster, how much it could be, what is between.

    python benchmarks/prefill.py CHECKPOINT [--dense packaged://smollm2_135m] [--repeats 9] [--threads 2]

First whole models by `lowrank_kit.evaluation.speed`: batch 8, a prompt of 256 tokens, 32 new ones, both in turn; the
ideal is what time in proportion to multiplications would give. Then the same prefill in parts, both models in turn
again, every layer timed where it stands: the linears of the blocks by role with the rate they reach (a product of
lower rank is a smaller one, and may be a slower one by the multiplication), and what else there is, which compression
leaves alone. CPU only: an accelerator's calls return before their work is done.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.config import SpeedConfig
from lowrank_kit.evaluation.speed import Speed, ideal_speedup, measure_speed, speedup
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.load import ModelSource, load_model
from lowrank_kit.runs.provenance import in_words, parse_study

WHOLE = "whole"

Parts = dict[str, float]


@torch.no_grad()
def main() -> None:
    arguments = _arguments()
    print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(arguments.threads)
    sources = {"dense": arguments.dense, "compressed": str(arguments.checkpoint)}
    models = {name: load_model(ModelSource(path), "causal", arguments.dtype).model for name, path in sources.items()}
    settings = SpeedConfig(
        batch_size=arguments.batch_size,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
    )
    print(f"batch {arguments.batch_size} x {arguments.prompt_tokens} + {arguments.new_tokens} tokens, "
          f"{str(arguments.dtype).removeprefix('torch.')}, {arguments.threads} threads, "
          f"{arguments.repeats} repeats; medians (least to most)\n")  # fmt: skip
    speeds = measure_speed(models, settings)
    report_models(speeds["dense"], speeds["compressed"])
    tokens = torch.randint(models["dense"].config.vocab_size, (arguments.batch_size, arguments.prompt_tokens))
    parts = measure_parts(models, tokens, arguments.repeats)
    report_linears(layout_of(models["compressed"]).linears, parts, tokens.numel())
    report_rest(layout_of(models["compressed"]).linears, parts)


def report_models(dense: Speed, compressed: Speed) -> None:
    """Print a table of both phases."""
    pairs = {
        "prefill": (dense.prefill_seconds, compressed.prefill_seconds),
        "decode": (dense.decode_seconds, compressed.decode_seconds),
    }
    print("| | dense, s | compressed, s | times faster | ideal |")
    print("|---|---|---|---|---|")
    figures = zip(pairs.items(), speedup(dense, compressed), ideal_speedup(dense, compressed), strict=True)
    for (phase, (slow, fast)), ratio, ideal in figures:
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        spread = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {phase} | {_spread(slow)} | {_spread(fast)} | {spread} | {ideal:.2f} |")


def measure_parts(models: Mapping[str, PreTrainedModel], tokens: Tensor, repeats: int) -> dict[str, Parts]:
    """Median seconds of a prefill in every model: of each linear of the blocks by name, of the other layers by class,
    and of the whole. One round goes before those that count."""
    rounds: dict[str, list[Parts]] = {name: [] for name in models}
    for _ in range(1 + repeats):
        for name, model in models.items():
            rounds[name].append(_timed_prefill(model, tokens))
    return {
        name: {part: statistics.median(parts[part] for parts in found[1:]) for part in found[0]}
        for name, found in rounds.items()
    }


def report_linears(refs: tuple[LinearRef, ...], parts: Mapping[str, Parts], tokens: int) -> None:
    """Print a row for every role: time saved against multiplications saved, summed over the blocks."""
    roles: dict[str, list[LinearRef]] = defaultdict(list)
    for ref in refs:
        roles[ref.role].append(ref)
    print("\n| role | shape | ranks | dense, ms | compressed, ms | times faster | ideal | GFLOP/s dense | compressed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for role, members in roles.items():
        slow, fast = (_sum(parts[name], members) for name in ("dense", "compressed"))
        before, after = _multiplies(members)
        ranks = sorted({ref.rank or min(ref.out_features, ref.in_features) for ref in members})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        print(f"| {role} | {members[0].out_features} x {members[0].in_features} | {shown} | {1e3 * slow:.0f} | "
              f"{1e3 * fast:.0f} | {slow / fast:.2f} | {before / after:.2f} | "
              f"{2e-9 * tokens * before / slow:.0f} | {2e-9 * tokens * after / fast:.0f} |")  # fmt: skip


def report_rest(refs: tuple[LinearRef, ...], parts: Mapping[str, Parts]) -> None:
    """Print what is no linear of a block, and how far the whole is from linears as fast as their multiplications."""
    dense, compressed = parts["dense"], parts["compressed"]
    linears = {ref.name for ref in refs}
    others = [part for part in dense if part not in linears and part != WHOLE]
    rest = [seconds[WHOLE] - sum(seconds[p] for p in seconds if p != WHOLE) for seconds in (dense, compressed)]
    rows = {
        "linears of the blocks": (_sum(dense, refs), _sum(compressed, refs)),
        **{part: (dense[part], compressed[part]) for part in others},
        "attention, rotation, sums": (rest[0], rest[1]),
        WHOLE: (dense[WHOLE], compressed[WHOLE]),
    }
    print("\n| part | dense, ms | compressed, ms | share of compressed |")
    print("|---|---|---|---|")
    for part, (slow, fast) in rows.items():
        print(f"| {part} | {1e3 * slow:.0f} | {1e3 * fast:.0f} | {100 * fast / compressed[WHOLE]:.0f} % |")
    before, after = _multiplies(refs)
    slow = _sum(dense, refs)
    bound = dense[WHOLE] / (dense[WHOLE] - slow + slow * after / before)
    print(f"\nWere every linear as much faster as it has fewer multiplications, the rest as it is: {bound:.2f} times "
          f"faster; measured in parts: {dense[WHOLE] / compressed[WHOLE]:.2f} times.")  # fmt: skip


def _timed_prefill(model: PreTrainedModel, tokens: Tensor) -> Parts:
    layout = layout_of(model)
    linears = {ref.name for ref in layout.linears}
    parts: Parts = defaultdict(float)
    handles = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{linear}.") for linear in linears)
        if name in linears or not (inside or list(module.children())):
            other = "head" if name == layout.head else type(module).__name__
            before, after = _stopwatch(parts, name if name in linears else other)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    parts[WHOLE] = time.perf_counter() - started
    for handle in handles:
        handle.remove()
    return parts


def _stopwatch(parts: Parts, part: str) -> tuple[Callable[..., None], Callable[..., None]]:
    started = 0.0

    def before(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: object) -> None:
        parts[part] += time.perf_counter() - started

    return before, after


def _sum(seconds: Parts, refs: list[LinearRef] | tuple[LinearRef, ...]) -> float:
    return sum(seconds[ref.name] for ref in refs)


def _multiplies(refs: list[LinearRef] | tuple[LinearRef, ...]) -> tuple[int, int]:
    """Per token, of the dense linears and of what stands in their place."""
    return sum(ref.parameters for ref in refs), sum(part.parameters for ref in refs for part in ref.parts)


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a compressed checkpoint")
    parser.add_argument("--dense", default="packaged://smollm2_135m", help="the model that it was made from")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    return parse_study(parser)


if __name__ == "__main__":
    main()
