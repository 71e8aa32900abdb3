"""Scalar descriptions of a spectrum: eigenvalues or singular values, in any order, none negative."""

from jaxtyping import Float, Float64

from lowrank_kit.deferred import Tensor, torch


def _descending(spectrum: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    values = spectrum.detach().double()
    if not values.isfinite().all() or (values < 0).any():
        bad = int((~(values.isfinite() & (values >= 0))).sum())
        raise ValueError(f"{bad} of {values.numel()} spectrum values are negative or not finite; clip them first")
    return values.sort(descending=True).values


def effective_rank(spectrum: Float[Tensor, " n"]) -> float:
    """`exp(-sum p ln p)` with `p = lambda / sum lambda` and `0 ln 0 = 0`; 0 for an all-zero spectrum.

    Source: Roy & Vetterli, "The effective rank" (EUSIPCO 2007), definition 1.
    """
    values = _descending(spectrum)
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def rank_density(spectrum: Float[Tensor, " n"], out_features: int, in_features: int) -> float:
    """Effective rank as a share of the largest rank the matrix can have, in [0, 1]."""
    return effective_rank(spectrum) / min(out_features, in_features)


def tail_energy(spectrum: Float[Tensor, " n"], k: int) -> float:
    """Share of the sum lost by keeping the `k` largest: 1 at k = 0, 0 at k = n or when all are zero."""
    values = _descending(spectrum)
    _check_index("k", k, 0, len(values))
    total = values.sum()
    return float(values[k:].sum() / total) if total > 0 else 0.0


def head_concentration(spectrum: Float[Tensor, " n"], k: int, eta: float) -> float:
    """`(k - k_eta) / k`, `k_eta` the fewest components with share `eta` of the energy that the first `k` hold.

    Near 1 when almost all of the kept energy sits in a few components; 1 for an all-zero spectrum.
    """
    values = _descending(spectrum)
    _check_index("k", k, 1, len(values))
    return _spared(values[:k], eta)


def tail_redundancy(spectrum: Float[Tensor, " n"], k: int, eta: float) -> float:
    """The share of the tail beyond `k` that is not needed to hold share `eta` of the tail's energy.

    Near 1 when a few components hold almost all that the tail has; 1 for a tail without energy or components.
    """
    values = _descending(spectrum)
    _check_index("k", k, 0, len(values))
    return _spared(values[k:], eta)


def _spared(values: Float64[Tensor, " n"], eta: float) -> float:
    """Share of descending values beyond the fewest with share `eta` of their sum."""
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], got {eta}")
    sums = values.cumsum(0)
    if not len(values) or sums[-1] == 0:
        return 1.0
    # The share is compared up to round-off, so that eta = 1 does not count what only rounding added.
    needed = int((sums < eta * sums[-1] * (1 - 1e-12)).sum()) + 1
    return (len(values) - needed) / len(values)


def tail_participation(spectrum: Float[Tensor, " n"], k: int) -> float:
    """Participation ratio of the tail beyond `k` over its length, `(sum t)^2 / (n sum t^2)`; 0 without energy.

    1 for a flat tail, 1/n for a tail of one value.
    """
    values = _descending(spectrum)
    _check_index("k", k, 0, len(values))
    tail = values[k:]
    return float(tail.sum() ** 2 / (len(tail) * tail.square().sum())) if tail.any() else 0.0


def decay_exponent(spectrum: Float[Tensor, " n"], start: int = 0) -> float:
    """Least-squares slope of `ln lambda_j` on `ln j` over the tail `j > start` (j from 1), zeros left out.

    -a for a power law `j**-a`. Raises ValueError when fewer than two positive values are left.
    """
    tail = _descending(spectrum)[start:]
    tail = tail[tail > 0]
    if len(tail) < 2:
        raise ValueError(f"a slope needs two positive values after index {start}, found {len(tail)}")
    x = torch.arange(start + 1, start + 1 + len(tail), dtype=torch.float64, device=tail.device).log()
    x = x - x.mean()
    return float(x @ tail.log() / (x @ x))


def _check_index(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high} for this spectrum, got {value}")
