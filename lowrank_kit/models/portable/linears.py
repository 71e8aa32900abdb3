"""Linears of low rank: two plain ones behind each other, as they are or by rows of their product."""

from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = up(down(x))``: a rank-r weight ``up.weight @ down.weight`` that is never multiplied out.

    Both halves are plain ``nn.Linear``, so that quantisers and PEFT find layers they know; ``up`` carries the
    bias. There is no ``weight``: code that needs one fails instead of reading half of it.
    """

    pivot_rows: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LowRankLinear":
        """Copy ``up`` [out, r], ``down`` [r, in] and ``bias`` [out] into a new layer, as they are or as told."""
        device, dtype = device or up.device, dtype or up.dtype
        layer = cls(down.shape[1], up.shape[0], up.shape[1], bias is not None, device=device, dtype=dtype)
        layer.down.weight.copy_(down)
        layer.up.weight.copy_(up)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]`` by ``rank * (in + out)`` multiplications a token."""
        return self.up(self.down(x))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Multiply the factors out: ``[out, in]`` in float64."""
        return self.up.weight.double() @ self.down.weight.double()

    def dense_bias(self) -> Tensor | None:
        """The bias of the product, ``[out]``."""
        return self.up.bias

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(LowRankLinear):
    """The same product by rows of it: ``y = [down(x), up(down(x))][index] + bias``.

    ``down.weight`` are rows that span all others, ``pivot_rows`` of which are rows of this matrix (all ``rank``, unless
    several matrices have one ``down``); ``up.weight`` has the coefficients of its other rows. PIFA, arXiv 2501.19090.
    """

    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        pivot_rows: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features - pivot_rows, rank, device=device, dtype=dtype)
        self.out_features, self.pivot_rows = out_features, pivot_rows
        self.bias: Any = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("index", torch.arange(out_features, device=device, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def from_pivots(
        cls,
        rows: Tensor,
        coefficients: Tensor,
        index: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "PivotLinear":
        """Copy ``rows`` [k, in], ``coefficients`` [rest, k], ``index`` [out] and ``bias`` [out] into a new layer."""
        (rank, in_features), rest, out_features = rows.shape, len(coefficients), len(index)
        device, dtype = device or rows.device, dtype or rows.dtype
        layer = cls(in_features, out_features, rank, out_features - rest, bias is not None, device, dtype)
        layer.down.weight.copy_(rows)
        layer.up.weight.copy_(coefficients)
        layer.index.copy_(index)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]`` by ``rank * (in + out - pivot_rows)`` multiplications a token."""
        pivots = self.down(x)
        outputs = torch.cat((pivots, self.up(pivots)), -1).index_select(-1, self.index)
        return outputs if self.bias is None else outputs + self.bias

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Multiply out and put in order: ``[out, in]`` in float64."""
        rows = self.down.weight.double()
        return torch.cat((rows, self.up.weight.double() @ rows))[self.index]

    def dense_bias(self) -> Tensor | None:
        """The bias of the product, ``[out]``."""
        return self.bias
