"""A low-rank product as a value."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, torch


@dataclass(frozen=True)
class LowRankFactors:
    """A product ``up @ down`` of rank r at most, `[out, in]`."""

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]

    @property
    def rank(self) -> int:
        """Columns of ``up``: the number of components, zero ones included."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: out, in."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The product, multiplied out."""
        return self.up @ self.down

    def norm(self) -> float:
        """Frobenius norm of the product, without multiplying it out."""
        # Of the triangular parts: the product of the Grams would lose what is left where components cancel.
        left, right = torch.linalg.qr(self.up).R, torch.linalg.qr(self.down.T).R
        return float(torch.linalg.matrix_norm(left @ right.T))

    def balanced(self) -> "LowRankFactors":
        """The same product ``U S V^T``, as ``U sqrt(S)`` and ``sqrt(S) V^T``: both factors learn at the same pace."""
        left, right = torch.linalg.qr(self.up), torch.linalg.qr(self.down.T)
        u, s, vh = torch.linalg.svd(left.R @ right.R.T)
        return LowRankFactors(left.Q @ u * s.sqrt(), (vh.T * s.sqrt()).T @ right.Q.T)

    def with_unit_columns(self) -> "LowRankFactors":
        """The same product with columns of ``up`` of length 1, or of zeros.

        So they are rounded with least loss: one scale serves a row of ``up``, and every row of ``down`` has its own.
        """
        lengths = self.up.norm(dim=0)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        return LowRankFactors(self.up / lengths, self.down * lengths[:, None])

    def __iter__(self) -> Iterator[Float[Tensor, "_ _"]]:
        """Up, then down, so that ``up, down = factors`` unpacks them."""
        return iter((self.up, self.down))

    def __matmul__(self, inputs: Float[Tensor, "in n"]) -> Float[Tensor, "out n"]:
        """The product applied to columns, one factor after the other."""
        return self.up @ (self.down @ inputs)
