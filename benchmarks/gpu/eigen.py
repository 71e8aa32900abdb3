"""Eigendecompositions of a symmetric matrix: on which device, in which precision, one by one or together, by size.

For a matrix of float64 with the spectrum of activations: seconds of a decomposition each way, and the largest error of
a value as a share of the largest. ``together``: four of one size, in a batch, and in threads with a stream each.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from time import perf_counter

import torch
from part import Figures, Part
from torch import Tensor

from lowrank_kit.spectral.eigenpairs import eigh, output_gram, svd
from lowrank_kit.spectral.moments import Moments

TOGETHER = 4


def main() -> None:
    part = Part(__doc__ or "")
    common, others = part.pick((4096, (1024, 5120, 8192)), (32, (48,)))
    part.measure(f"{common}", partial(alone, part, common))
    part.measure(f"{common}, together", partial(together, part, common))
    for size in others:
        part.measure(f"{size}", partial(alone, part, size))
    part.measure("reflectors of a tall matrix", partial(tall, part, *part.pick((11008, 4096), (96, 64))))
    part.finish()


def alone(part: Part, size: int) -> Figures:
    """One matrix, by every route that there is."""
    there = gram_of(part, size)
    gram = there.cpu()
    routes: dict[str, Callable[[], Tensor]] = {
        "device, float64": lambda: torch.linalg.eigh(there)[0],
        "device, float32": lambda: torch.linalg.eigh(there.float())[0],
        "device, float64, values alone": lambda: torch.linalg.eigvalsh(there),
    }
    if size <= part.pick(4096, 64):
        routes["CPU, all threads, float64"] = lambda: eigh(gram).values.flip(0)
    found = {name: timed(part, route, 1) for name, route in routes.items()}
    exact = torch.linalg.eigvalsh(there).cpu()
    errors = {name: float((values.cpu() - exact).abs().max() / exact[-1]) for name, (_, values) in found.items()}
    return {"each": {name: {"seconds": seconds, "error": errors[name]} for name, (seconds, _) in found.items()}}


def together(part: Part, size: int) -> Figures:
    """Several matrices, seconds of one."""
    grams = torch.stack([gram_of(part, size, seed) for seed in range(TOGETHER)])

    def on_a_stream(gram: Tensor) -> Tensor:
        if part.device == "cpu":
            return torch.linalg.eigh(gram)[0]
        with torch.cuda.stream(torch.cuda.Stream()):
            return torch.linalg.eigh(gram)[0]

    def in_threads(count: int) -> list[Tensor]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(on_a_stream, grams))

    routes: dict[str, Callable[[], object]] = {
        "one by one": lambda: [torch.linalg.eigh(gram) for gram in grams],
        "batched": lambda: torch.linalg.eigh(grams),
        **{f"{count} threads": partial(in_threads, count) for count in (2, 4)},
    }
    return {"seconds of one": {name: timed(part, route, 1, warm=0)[0] / TOGETHER for name, route in routes.items()}}


def tall(part: Part, rows: int, columns: int) -> Figures:
    """What a matrix with more outputs than inputs takes: its reflectors, and the lifting of the vectors."""
    weight = torch.randn(rows, columns, device=part.device)
    moments = Moments.zeros(columns, part.device)
    moments.gram += gram_of(part, columns)

    def lifted() -> Tensor:
        gram, lift = output_gram(weight, moments)
        return lift(gram)

    gram, lift = output_gram(weight, moments)
    vectors = lift(torch.linalg.qr(gram).Q)
    units = torch.eye(columns, dtype=vectors.dtype, device=vectors.device)
    error = float((vectors.T @ vectors - units).abs().max())
    return {
        "reflect and lift": timed(part, lifted)[0],
        "svd": timed(part, lambda: svd(weight), 1)[0],
        "orthonormal to": error,
    }


def gram_of(part: Part, size: int, seed: int = 0) -> Tensor:
    """A Gram whose values fall by six orders of magnitude, with a few much larger ones."""
    draw = torch.Generator(part.device).manual_seed(seed)
    scale = torch.logspace(0, -3, size, dtype=torch.float64, device=part.device)
    scale[:3] *= 100
    rows = torch.randn(2 * size, size, generator=draw, dtype=torch.float64, device=part.device) * scale
    mixed = rows + 0.1 * rows.roll(1, 1)
    return mixed.T @ mixed


def timed(part: Part, work: Callable[[], object], repeats: int = 3, warm: int = 1) -> tuple[float, object]:
    """Median seconds, after ``warm`` rounds that do not count, and what the work gave."""
    seconds = []
    for _ in range(warm + repeats):
        part.synchronise()
        started = perf_counter()
        found = work()
        part.synchronise()
        seconds.append(perf_counter() - started)
    return median(seconds[warm:]), found


if __name__ == "__main__":
    main()
