"""Optimal low-rank truncation of a weight under a two-sided metric, worked out on its smaller side.

The loss of replacing W by W' is `||B^(1/2) (W - W') C^(1/2)||_F^2`, with C a second moment of the inputs and B a
metric on the outputs (identity, diagonal, or the second moment of the loss's gradients). Its minimum over rank k is
reached by projecting W on k directions, whose choice one symmetric eigenproblem gives for every k at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Float64

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.eigenpairs import eigh, numerical_rank, output_gram
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.moments import Moments


@dataclass(frozen=True)
class Projection:
    """Directions in order of importance: rank k keeps `W' = E_k R_k W` (side output) or `W E_k R_k` (input).

    `values` are the squared singular values of `B^(1/2) W C^(1/2)`, descending: rank k loses `values[k:].sum()`.
    """

    side: Literal["output", "input"]
    values: Float64[Tensor, " p"]
    expand: Float[Tensor, "n p"]
    reduce: Float[Tensor, "p n"]

    def only(self, kept: Sequence[int]) -> "Projection":
        """The projection on these directions alone."""
        index = torch.tensor(kept, dtype=torch.long, device=self.values.device)
        return Projection(self.side, self.values[index], self.expand[:, index], self.reduce[index])

    def components(self, weight: Float[Tensor, "out in"]) -> LowRankFactors:
        """The parts of W that stand for the directions, `W_k = up[:, k] down[k]`, in float64."""
        weight = weight.detach().double()
        expand, reduce = (part.to(weight.device, torch.float64) for part in (self.expand, self.reduce))
        if self.side == "output":
            return LowRankFactors(expand, reduce @ weight)
        return LowRankFactors(weight @ expand, reduce)

    def factors(self, weight: Float[Tensor, "out in"], rank: int) -> LowRankFactors:
        """Return the product of this rank in float64, its components equally long on both sides, zero beyond p."""
        up, down = self.only(range(min(rank, len(self.values)))).components(weight)
        # Half precision keeps the factors only where neither is much larger than the other.
        lengths = up.norm(dim=0), down.norm(dim=1)
        balance = torch.where(lengths[0] * lengths[1] > 0, (lengths[1] / lengths[0]).sqrt(), 1.0)
        missing, pad = rank - up.shape[1], torch.nn.functional.pad
        return LowRankFactors(pad(up * balance, (0, missing)), pad(down / balance[:, None], (0, 0, 0, missing)))


def output_projection(
    weight: Float[Tensor, "out in"],
    inputs: Moments,
    root: Float64[Tensor, "out out"] | Float64[Tensor, " out"] | None = None,
) -> Projection:
    """Project on output directions, given C as moments of the inputs and the root `B^(1/2)` (None: identity).

    A vector `root` is a diagonal. Directions that no output has come last: the full rank is W itself. No root or
    inverse of C is taken, so that a singular or ill-conditioned C is as good as any: `W' = B^(-1/2) U U^T B^(1/2) W`
    with U the eigenvectors of `B^(1/2) W C W^T B^(1/2)`.

    Raises:
        ValueError: non-finite entries.
    """
    gram, lift = output_gram(weight if root is None else _times(root, weight.detach().double()), inputs)
    pairs = eigh(gram)
    # Of a wide model each of these is as large as the weight.
    del gram
    return _from_eigenvectors(pairs.values, lift(pairs.vectors), root)


def output_projection_from_gram(
    gram: Float64[Tensor, "out out"], root: Float64[Tensor, "out out"] | Float64[Tensor, " out"] | None = None
) -> Projection:
    """As `output_projection`, from `gram = W C W^T`: the second moment of the outputs without the bias."""
    if root is not None:
        gram = _times(root, _times(root, gram).T)
    pairs = eigh(gram)
    return _from_eigenvectors(pairs.values, pairs.vectors, root)


def input_projection(inputs: Float64[Tensor, "in in"], pulled_back: Float64[Tensor, "in in"]) -> Projection:
    """Project on input directions, given C and the metric B as the inputs see it, `pulled_back = W^T B W`.

    For `out > in`, where B itself would be the larger matrix, and for several weights with one input
    (`sum W_i^T B_i W_i`). With `C = L L^T` and V the eigenvectors of `L^T W^T B W L` for eigenvalues S^2,
    `W' = W (L V S^-1) (S^-1 V^T L^T W^T B W)`: no inverse of C is taken, and directions below the numerical rank,
    which cost nothing, are left out.

    Raises:
        ValueError: non-finite entries.
    """
    root = _root(inputs)
    pairs = eigh(root.T @ pulled_back @ root)
    pairs = pairs[: numerical_rank(pairs.values, pulled_back.shape[0])]
    expand = root @ pairs.vectors / pairs.values.sqrt()
    return Projection("input", pairs.values, expand, expand.T @ pulled_back)


def damped_root(gram: Float[Tensor, "n n"], damping: float) -> Float64[Tensor, "n n"]:
    """Symmetric root of `gram + damping * mean(diagonal) * I`, positive definite for any `damping > 0`."""
    gram = gram.double()
    pairs = eigh(gram)
    values = pairs.values + damping * gram.trace() / gram.shape[0]
    return (pairs.vectors * values.sqrt()) @ pairs.vectors.T


def _from_eigenvectors(values: Tensor, vectors: Tensor, root: Tensor | None) -> Projection:
    if root is None:
        return Projection("output", values, vectors, vectors.T)
    expand = vectors / root[:, None] if root.ndim == 1 else torch.linalg.solve(root, vectors)
    return Projection("output", values, expand, _times(root, vectors).T)


def _times(root: Tensor | None, matrix: Tensor) -> Tensor:
    if root is None:
        return matrix
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _root(gram: Tensor) -> Tensor:
    """`L [n, rank]` with `L L^T = gram`."""
    pairs = eigh(gram)
    pairs = pairs[: numerical_rank(pairs.values, gram.shape[0])]
    return pairs.vectors * pairs.values.sqrt()
