"""A low-rank product as rows of it that span all others: PIFA, "Pivoting Factorization" (arXiv 2501.19090).

A matrix W [out, in] of rank k has k rows P that its other rows are combinations of: `W[rest] = M P`. P and M are
`k (out + in - k)` numbers where two factors are `k (out + in)`, and nothing is lost. The rows are chosen such that no
entry of M is much above 1, or rounding P would tell on the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.factors import LowRankFactors

LIMIT = 1.01
"""Largest coefficient that is left alone; with 1, round-off could keep the swaps going."""


@dataclass(frozen=True)
class PivotFactors:
    """The product `[rows; coefficients @ rows][index]`, `[out, in]`, of rank k at most."""

    rows: Float[Tensor, "k in"]
    coefficients: Float[Tensor, "rest k"]
    index: Int64[Tensor, " out"]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: out, in."""
        return self.index.shape[0], self.rows.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The product, multiplied out."""
        return torch.cat([self.rows, self.coefficients @ self.rows])[self.index]

    def split(self, out_features: int) -> "Iterator[PivotFactors]":
        """The matrices of so many rows that this one is a stack of; all have all `rows`, whosever they are."""
        pivots = len(self.rows)
        for index in self.index.split(out_features):
            rest = index >= pivots
            coefficients = self.coefficients[index[rest] - pivots]
            yield PivotFactors(self.rows, coefficients, torch.where(rest, pivots + rest.cumsum(0) - 1, index))


def pivoted(factors: LowRankFactors) -> PivotFactors:
    """The same product by its rows, in float64; its rank must not be above `out`.

    The factors may be of any rank, and any scale: the coefficients are those of an orthonormal basis of the columns.
    """
    up, down = factors.up.double(), factors.down.double()
    # Householder's has k orthonormal columns whatever the rank is, and those of `up` are combinations of them.
    basis = torch.linalg.qr(up).Q
    pivots = spanning_rows(basis)
    coefficients = _coefficients(basis, pivots)
    is_pivot = torch.zeros(len(up), dtype=torch.bool, device=up.device)
    is_pivot[pivots] = True
    index = torch.where(is_pivot, is_pivot.cumsum(0) - 1, len(pivots) + (~is_pivot).cumsum(0) - 1)
    return PivotFactors(up[pivots] @ down, coefficients[~is_pivot], index)


def spanning_rows(basis: Float64[Tensor, "n k"]) -> Int64[Tensor, " k"]:
    """Rows, in ascending order, of which all others are combinations with no coefficient above `LIMIT`.

    They are of (locally) largest volume: from the pivots of an LU decomposition on, a row that has a larger coefficient
    takes the place of the row that it is a coefficient of (Goreinov et al. 2010, "How to find a good submatrix"). Every
    swap multiplies the volume by that coefficient, so that they end. ``basis`` has rank k.
    """
    pivots = _rows_of_lu(basis)
    while True:
        coefficients = _coefficients(basis, pivots)
        [candidates] = (coefficients.abs().amax(1) > LIMIT).nonzero(as_tuple=True)
        if not len(candidates):
            return pivots.sort().values
        # Swaps among the few rows at fault cost little; what they do to the others is worked out at once, afterwards.
        among = coefficients[candidates]
        while True:
            row, column = divmod(int(among.abs().argmax()), among.shape[1])
            largest = among[row, column].clone()
            if not largest.abs() > LIMIT:
                break
            change = among[row].clone()
            change[column] -= 1
            among -= torch.outer(among[:, column] / largest, change)
            pivots[column] = candidates[row]


def _rows_of_lu(basis: Float64[Tensor, "n k"]) -> Int64[Tensor, " k"]:
    """The pivots of an LU decomposition, without its permutation as a matrix `[n, n]`."""
    order = list(range(len(basis)))
    for step, swapped in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):
        order[step], order[swapped - 1] = order[swapped - 1], order[step]
    return torch.tensor(order[: basis.shape[1]], device=basis.device)


def _coefficients(basis: Float64[Tensor, "n k"], pivots: Int64[Tensor, " k"]) -> Float64[Tensor, "n k"]:
    """Every row as a combination of the pivots."""
    return torch.linalg.solve(basis[pivots], basis, left=False)
