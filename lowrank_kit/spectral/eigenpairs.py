"""Eigen- and singular decompositions in float64, with declared policies for order, signs and rank.

Order: descending. Signs: `fix_signs`. Rank: `numerical_rank`. Equal inputs give equal outputs on one machine.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from jaxtyping import Float, Float64
from threadpoolctl import ThreadpoolController

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.moments import Moments

ONE_THREAD_SIDE = 1024
"""Up to this side one BLAS thread decomposes a matrix: more gain little, and waste a busy machine by waiting.

Measured at 576 on two busy cores: 0.08 s, against 0.13 to 3.9 s with two threads.
"""

Which = Literal["largest", "middle", "smallest"]
"""Where in the descending spectrum a run of eigenpairs is taken."""

COLUMNS_AT_A_TIME = 512
"""Of a tall matrix, what is copied at a time while it is worked on."""

SUBSET_SHARE = 0.2
"""Up to this share of the pairs, computing a subset beats the full decomposition (at n = 576 and 1536)."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in descending order, none negative, and their orthonormal vectors as columns."""

    values: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "n k"]

    def __getitem__(self, pairs: slice) -> "Eigenpairs":
        return Eigenpairs(self.values[pairs], self.vectors[:, pairs])


def fix_signs(vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Flip columns so that the entry of largest absolute value is positive.

    Entries within 1e-6 of the largest count as equal and the first of them decides: round-off cannot flip it.
    """
    return vectors * _signs(vectors)


def eigh(gram: Float[Tensor, "n n"]) -> Eigenpairs:
    """All eigenpairs of a positive semi-definite matrix; its symmetric part is used, values clipped at 0.

    Raises:
        ValueError: non-finite entries.
    """
    return _solve(_symmetric(gram), None)


def eigenvalues(gram: Float[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    """The values of `eigh(gram)` alone, in a third of the time."""
    symmetric = _symmetric(gram)
    if symmetric.device.type == "cpu":
        ascending = torch.from_numpy(_lapack_eigh(symmetric, eigvals_only=True))
    else:
        ascending = torch.linalg.eigvalsh(symmetric)
    return ascending.flip(0).clamp(min=0)


def partial_eigh(gram: Float[Tensor, "n n"], start: int, stop: int) -> Eigenpairs:
    """Eigenpairs number `start` to `stop - 1` in descending order; only those are computed when they are few.

    Raises:
        ValueError: non-finite entries, or not `0 <= start <= stop <= n`.
    """
    n = gram.shape[0]
    if not 0 <= start <= stop <= n:
        raise ValueError(f"pairs {start}:{stop} asked of a spectrum of {n}; use 0 <= start <= stop <= {n}")
    symmetric = _symmetric(gram)
    if start == stop:
        return Eigenpairs(symmetric.new_zeros(0), symmetric.new_zeros(n, 0))
    if symmetric.device.type != "cpu" or stop - start > SUBSET_SHARE * n:
        return _solve(symmetric, None)[start:stop]
    return _solve(symmetric, (n - stop, n - start - 1))


def numerical_rank(values: Float[Tensor, " k"], size: int, tolerance: float | None = None) -> int:
    """Number of eigenvalues above `tolerance` times the largest; 0 when all are zero.

    `tolerance` defaults to `size` float64 eps, the error of an eigendecomposition of side `size` in float64:
    right for a Gram summed in float64, or for `W C W^T` whose null space comes from the weight.
    A Gram summed from float32 products has noise of up to 0.7 float32 eps of its largest eigenvalue (measured at
    widths 96 to 1536), but true eigenvalues may lie below: layers with a few very large channels have them.
    """
    if not values.any():
        return 0
    return int((values > _relative(size, tolerance) * values.max()).sum())


def range_eigenpairs(
    gram: Float[Tensor, "n n"],
    count: int | None = None,
    which: Which = "largest",
    *,
    tolerance: float | None = None,
    rank_bound: int | None = None,
) -> Eigenpairs:
    """`count` consecutive eigenpairs inside the numerical range, at an end or in the middle; None for all.

    `rank_bound` is a bound on the rank known from elsewhere, such as the number of tokens. Fewer pairs than
    `count` come back when the range is smaller.
    """
    n = gram.shape[0]
    bound = n if rank_bound is None else min(n, rank_bound)
    if count is None or count > SUBSET_SHARE * n:
        pairs = eigh(gram)
        rank = min(bound, numerical_rank(pairs.values, n, tolerance))
        return pairs[_window(rank, count, which)]
    if which == "largest":
        pairs = partial_eigh(gram, 0, min(count, bound))
        return pairs[: numerical_rank(pairs.values, n, tolerance)]
    if which == "smallest" and bound == n:
        pairs = partial_eigh(gram, n - count, n)
        # The trace bounds the largest eigenvalue, so this proves full rank without the rest of the spectrum.
        if pairs.values[-1] > _relative(n, tolerance) * gram.trace():
            return pairs
    rank = min(bound, numerical_rank(eigenvalues(gram), n, tolerance))
    window = _window(rank, count, which)
    return partial_eigh(gram, window.start, window.stop)


def output_eigenvalues(
    weight: Float[Tensor, "out in"], inputs: Moments, bias: Float[Tensor, " out"] | None = None
) -> Float64[Tensor, " p"]:
    """Descending eigenvalues of `sum y y^T` for `y = W x + b`: the p = min(out, in) that can be non-zero.

    With a bias p = min(out, in + 1). The numerical rank is `numerical_rank(values, p)`.
    """
    return eigenvalues(output_gram(weight, inputs, bias)[0])


def output_eigenpairs(
    weight: Float[Tensor, "out in"],
    inputs: Moments,
    bias: Float[Tensor, " out"] | None = None,
    *,
    count: int | None = None,
    which: Which = "largest",
    tolerance: float | None = None,
) -> Eigenpairs:
    """Eigenpairs of `sum y y^T` for `y = W x + b` from the moments of x, vectors of length `out`.

    Selection as in `range_eigenpairs`, the rank bounded by the number of tokens. The work is done on the
    smaller side: for `out > in` and `W = Q R` the outputs lie in the span of Q, so the vectors of `R C R^T`
    are lifted by Q: orthonormal to round-off however ill-conditioned C is, with no root or inverse of C.
    """
    gram, lift = output_gram(weight, inputs, bias)
    pairs = range_eigenpairs(gram, count, which, tolerance=tolerance, rank_bound=inputs.count)
    return Eigenpairs(pairs.values, lift(pairs.vectors))


def output_gram(
    weight: Float[Tensor, "out in"], inputs: Moments, bias: Float[Tensor, " out"] | None = None
) -> tuple[Float64[Tensor, "p p"], Callable[[Tensor], Tensor]]:
    """`sum y y^T` for `y = W x + b` on the smaller side, and what lifts its vectors to the outputs, signs fixed."""
    weight, second_moment = weight.detach(), inputs.gram
    if bias is not None:
        weight = torch.cat([weight.double(), bias.detach().double()[:, None]], 1)
        second_moment = inputs.augmented()
    _check_finite(weight)
    out, width = weight.shape
    if out <= width:
        weight = weight.double()
        return weight @ second_moment @ weight.T, lambda vectors: vectors
    # By columns, as LAPACK has it, which puts the reflectors into their place.
    reflectors = torch.empty(width, out, dtype=torch.float64, device=weight.device).T.copy_(weight)
    tau = reflectors.new_empty(width)
    torch.geqrf(reflectors, out=(reflectors, tau))
    triangle = reflectors[:width].triu()
    return triangle @ second_moment @ triangle.T, partial(_lifted, reflectors, tau)


def svd(
    weight: Float[Tensor, "out in"],
) -> tuple[Float64[Tensor, "out p"], Float64[Tensor, " p"], Float64[Tensor, "p in"]]:
    """Thin SVD `U, S, Vh` in float64, signs fixed on U. Raises ValueError for non-finite entries."""
    _check_finite(weight)
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    signs = _signs(u)
    return u * signs, s, vh * signs[:, None]


def complete_basis(vectors: Float[Tensor, "n k"], count: int) -> Float64[Tensor, "n count"]:
    """`count` orthonormal columns orthogonal to the k given ones (linearly independent), deterministic.

    Raises:
        ValueError: fewer than `count` dimensions are left.
    """
    n, k = vectors.shape
    if k + count > n:
        raise ValueError(f"{count} further columns asked, but {k} of {n} dimensions are taken; {n - k} are left")
    units = torch.zeros(n, count, dtype=torch.float64, device=vectors.device)
    units[range(k, k + count), range(count)] = 1
    if k == 0:
        return units
    reflectors, tau = torch.geqrf(vectors.detach().double())
    return fix_signs(torch.ormqr(reflectors, tau, units))


def random_orthonormal(n: int, k: int, seed: int) -> Float64[Tensor, "n k"]:
    """Haar-distributed orthonormal columns, up to the sign policy, drawn on CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return fix_signs(torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q)


def _lifted(reflectors: Tensor, tau: Tensor, vectors: Tensor) -> Tensor:
    """`Q [vectors; 0]`, signs fixed."""
    lifted = vectors.new_empty(reflectors.shape[0], vectors.shape[1])
    for place, part in zip(*(each.split(COLUMNS_AT_A_TIME, 1) for each in (lifted, vectors)), strict=True):
        padded = torch.nn.functional.pad(part, (0, 0, 0, len(lifted) - len(part)))
        place.copy_(torch.ormqr(reflectors, tau, padded))
        place.mul_(_signs(place))
    return lifted


def _solve(symmetric: Tensor, ascending: tuple[int, int] | None) -> Eigenpairs:
    """Eigenpairs with inclusive `ascending` indices, all for None."""
    if symmetric.device.type != "cpu":
        values, vectors = torch.linalg.eigh(symmetric)
    else:
        driver = "evd" if ascending is None else "evr"
        found = _lapack_eigh(symmetric, subset_by_index=ascending, driver=driver)
        values, vectors = (torch.from_numpy(part) for part in found)
    return Eigenpairs(values.flip(0).clamp(min=0), fix_signs(vectors.flip(1)))


def _lapack_eigh(symmetric: Tensor, **options: Any) -> Any:
    """What `scipy.linalg.eigh` returns, by one BLAS thread where more would only wait for each other.

    The matrix is overwritten: vectors take its place.
    """
    # Imported at the first decomposition: whoever only reads settings does without.
    from scipy.linalg import eigh

    one_thread = symmetric.shape[0] <= ONE_THREAD_SIDE
    with _blas().limit(limits=1, user_api="blas") if one_thread else nullcontext():
        # Transposed it is the same, and lies by columns as LAPACK has it: no copy.
        return eigh(symmetric.numpy().T, check_finite=False, overwrite_a=True, **options)


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries that are loaded by now, SciPy's among them."""
    return ThreadpoolController()


def _window(rank: int, count: int | None, which: Which) -> slice:
    size = rank if count is None else min(count, rank)
    start = {"largest": 0, "middle": (rank - size) // 2, "smallest": rank - size}[which]
    return slice(start, start + size)


def _relative(size: int, tolerance: float | None) -> float:
    return size * torch.finfo(torch.float64).eps if tolerance is None else tolerance


def _signs(vectors: Tensor) -> Tensor:
    return torch.cat([_signs_of_few(part) for part in vectors.split(COLUMNS_AT_A_TIME, 1)])


def _signs_of_few(vectors: Tensor) -> Tensor:
    magnitudes = vectors.abs()
    leading = magnitudes >= (1 - 1e-6) * magnitudes.amax(0, keepdim=True)
    first = leading.to(torch.int8).argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, first) < 0, -1.0, 1.0).to(vectors.dtype)[0]


def _symmetric(gram: Tensor) -> Tensor:
    _check_finite(gram)
    gram = gram.detach().double()
    return (gram + gram.T).div_(2)


def _check_finite(matrix: Tensor) -> None:
    # A finite sum proves every entry finite, at a tenth of the cost of looking at each.
    if not matrix.sum().isfinite() and (bad := int((~matrix.isfinite()).sum())):
        raise ValueError(f"{bad} of {matrix.numel()} matrix entries are not finite (NaN or infinite)")
