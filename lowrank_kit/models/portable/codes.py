"""Linears whose weights are whole numbers of a few bits."""

from typing import Any

import torch
from torch import Tensor, nn


class RoundedLinear(nn.Module):
    """A linear whose weight is whole numbers of ``bits`` bits times a scale for every ``group`` inputs (0: for all).

    ``codes`` are int8 ``[out, in]``, or, two to a byte with the first in the lower half, uint8 ``[out, ceil(in / 2)]``;
    ``scale`` is ``[out, groups]``. They are buffers: nothing of the weight is trained. It is multiplied out for every
    pass, in the number format of the scales.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        width, groups = -(-in_features * bits // 8), -(-in_features // group) if group else 1
        integer = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, width, device=device, dtype=integer))
        self.register_buffer("scale", torch.ones(out_features, groups, device=device, dtype=dtype))
        self.bias: Any = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes: Tensor, scale: Tensor, bits: int, group: int, bias: Tensor | None = None
    ) -> "RoundedLinear":
        """Pack ``codes`` [out, in], int8 in any case, into a new layer with ``scale`` and a copy of ``bias``."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, bits, group, bias is not None, scale.device, scale.dtype)
        if bits == 4:
            low, high = nn.functional.pad(codes, (0, in_features % 2)).unflatten(1, (-1, 2)).unbind(-1)
            codes = (low & 15 | high << 4).view(torch.uint8)
        layer.codes.copy_(codes)
        layer.scale.copy_(scale)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, ``[out, in]``."""
        codes = self.codes
        if self.bits == 4:
            # The shift of a signed byte keeps the sign.
            packed = codes.view(torch.int8)
            codes = torch.stack((packed << 4 >> 4, packed >> 4), -1).flatten(1)[:, : self.in_features]
        weight = codes.to(self.scale.dtype)
        if not self.group:
            return weight * self.scale
        return weight * self.scale.repeat_interleave(self.group, 1)[:, : self.in_features]

    def dense_weight(self) -> Tensor:
        """The weight, in float64."""
        return self.weight.double()

    def dense_bias(self) -> Tensor | None:
        """The bias, ``[out]``."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]``."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
