"""Loss over the optimum of every way to truncate W for inputs X, from well-conditioned to rank-deficient, in one table.

    python benchmarks/truncation.py > benchmarks/results/truncation.md

The optimum is Eckart and Young's on the outputs themselves, an SVD of W X in float64 by numpy, without any Gram
matrix. The others are the published ways, written down here from the papers: SVD-LLM (arXiv 2403.07378: Cholesky
factor of the Gram matrix in float64, its diagonal shifted where that fails, and its inverse), and SVD-LLM v2
(arXiv 2503.12340: SVD of the Gram matrix, pseudo-inverse of its root), in float64 and in float32. Random data, one seed
a shape: a check, not a timing.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import Projection, input_projection, output_projection, output_projection_from_gram

TOKENS = 2048
SHAPES = ((192, 256), (256, 256), (384, 192))
INPUTS: dict[str, float | None] = {"1e2": 2, "4e9": 9.6, "1e15": 15, "rank 2n/3": None}
HEADER = """# Truncation loss divided by the optimum

`python benchmarks/truncation.py`

The worst of the ranks that pay (an eighth of break-even to all of it), and a rank of 7/8 of all directions, where the
optimum at 1e15 is 1e-13 of the outputs: less than what a Gram matrix in float64 tells apart. 1 + x: x is the relative
excess.

| condition of the inputs' Gram | W | way | loss / optimum, ranks that pay | at 7/8 |
|---|---|---|---|---|"""
Factors = Callable[[int], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    print(f"{in_words(parse_study(parser).provenance)}\n")
    print(HEADER)
    for (name, decades), shape in itertools.product(INPUTS.items(), SHAPES):
        x, weight = inputs(decades, shape[1]), torch.randn(shape, dtype=torch.float64, generator=_generator(1))
        values = np.linalg.svd((weight @ x.T).numpy(), compute_uv=False) ** 2
        directions = int((values > 1e-24 * values[0]).sum())
        pays = min(shape[0] * shape[1] // sum(shape), directions - 1)
        for way, factors in ways(weight, x):
            worst = max(_excess(weight, x, values, pays * part // 8, factors) for part in range(1, 9))
            deep = _excess(weight, x, values, directions * 7 // 8, factors)
            print(f"| {name} | {shape[0]}x{shape[1]} | {way} | {_shown(worst)} | {_shown(deep)} |")


def inputs(decades: float | None, n: int) -> Tensor:
    """Rows whose Gram matrix has this condition (decimal exponent), or a third of its directions missing."""
    mix = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=_generator(2))).Q
    scales = torch.logspace(0, -(2 if decades is None else decades) / 2, n, dtype=torch.float64)
    if decades is None:
        scales[2 * n // 3 :] = 0
    basis = torch.linalg.qr(torch.randn(TOKENS, n, dtype=torch.float64, generator=_generator(3))).Q
    return TOKENS**0.5 * basis * scales @ mix


def ways(weight: Tensor, x: Tensor) -> Iterator[tuple[str, Factors]]:
    moments = Moments.zeros(x.shape[1])
    moments.update(x)
    yield "ours, from the inputs", _ours(weight, output_projection(weight, moments))
    yield "ours, from the outputs' Gram", _ours(weight, output_projection_from_gram((weight @ x.T) @ (weight @ x.T).T))
    if weight.shape[0] > weight.shape[1]:
        yield "ours, on the input side", _ours(weight, input_projection(moments.gram, weight.T @ weight))
    yield "SVD-LLM, Cholesky", _cholesky(weight, moments.gram)
    yield "SVD-LLM v2, float64", _pseudo_inverse(weight, moments.gram)
    yield "SVD-LLM v2, float32", _pseudo_inverse(weight.float(), moments.gram.float())


def _ours(weight: Tensor, projection: Projection) -> Factors:
    return lambda rank: projection.factors(weight, rank)


def _cholesky(weight: Tensor, gram: Tensor) -> Factors:
    try:
        root = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:
        # As released: the smallest eigenvalue, made positive.
        shift = 1e-6 - torch.linalg.eigvalsh(gram)[0]
        root = torch.linalg.cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype))
    return _whitened(weight, root, torch.linalg.inv(root))


def _pseudo_inverse(weight: Tensor, gram: Tensor) -> Factors:
    u, s, _ = torch.linalg.svd(gram)
    root = u * s.sqrt()
    return _whitened(weight, root, torch.linalg.pinv(root))


def _whitened(weight: Tensor, root: Tensor, inverse: Tensor) -> Factors:
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    return lambda rank: (u[:, :rank] * s[:rank], v[:rank] @ inverse)


def _excess(weight: Tensor, x: Tensor, values: np.ndarray, rank: int, factors: Factors) -> float:
    up, down = factors(rank)
    loss = float(((weight - up.double() @ down.double()) @ x.T).square().sum())
    return loss / float(values[rank:].sum()) - 1


def _shown(excess: float) -> str:
    return f"1 + {max(excess, 1e-16):.0e}" if excess < 0.01 else f"{1 + excess:.3g}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
