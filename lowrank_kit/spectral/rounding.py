"""Weights as whole numbers of a few bits times a scale, and what rounding them costs in a two-sided metric."""

from dataclasses import dataclass

from jaxtyping import Float, Float64, Int8

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.spectral.truncate import Projection


@dataclass(frozen=True)
class Rounding:
    """``w = code * scale``: a signed whole number of ``bits`` bits, a scale for every ``group`` inputs of an output.

    ``group`` 0: one scale an output. The last group may be shorter. Symmetric, as torchao's weight-only formats are:
    the largest weight of a group lies half a step beyond the largest code.
    """

    bits: int
    group: int = 0

    def scales(self, columns: int) -> int:
        """Scales of an output that reads so many inputs."""
        return -(-columns // self.group) if self.group else 1

    def size(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of a matrix: the codes of an output packed into whole bytes, and scales of ``itemsize`` bytes."""
        return rows * (-(-columns * self.bits // 8) + self.scales(columns) * itemsize)

    def codes(
        self, weight: Float[Tensor, "rows columns"], dtype: "torch.dtype"
    ) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows groups"]]:
        """The codes of a weight, and its scales in the number format in which they are stored."""
        rows, columns = weight.shape
        width, groups = self.group or columns, self.scales(columns)
        padded = torch.nn.functional.pad(weight.double(), (0, groups * width - columns)).view(rows, groups, width)
        least, most = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        scale = (2 * padded.abs().amax(-1) / (most - least)).to(dtype)
        # A group of zeros has any scale.
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (padded / scale.double()[..., None]).round().clamp(least, most)
        return codes.view(rows, -1)[:, :columns].to(torch.int8), scale

    def rounded(self, weight: Float[Tensor, "rows columns"], dtype: "torch.dtype") -> Float64[Tensor, "rows columns"]:
        """What the codes and scales of a weight stand for."""
        codes, scale = self.codes(weight, dtype)
        columns = weight.shape[1]
        return codes.double() * scale.double().repeat_interleave(self.group or columns, 1)[:, :columns]


def rounding_losses(
    projection: Projection,
    weight: Float[Tensor, "out in"],
    metric: tuple[Float64[Tensor, " out"], Float64[Tensor, " in"]],
    rounding: Rounding,
    dtype: "torch.dtype",
) -> Float64[Tensor, " _"]:
    """What rounding adds to ``tr(B (W - W') C (W - W')^T)``: by component of the truncation, and last that of W itself.

    ``metric`` holds the diagonals of B and C. Rounding errors of different weights are independent, so that in
    expectation they see no more of it: E of ``tr(B E C E^T)`` is ``sum B_ii C_jj E_ij^2``. Of factors ``u_j v_j^T`` the
    other side is a component, of length 1 in B and of its value in C: ``sum_ij B_ii (error of u)_ij^2 value_j`` and
    ``sum_jc (error of v)_jc^2 C_cc``. They are orthogonal to what the truncation leaves out, so that rank k in few bits
    costs ``tail(k)`` plus the first k entries. Scales are those of the factors with all their components.
    """
    rows, columns = metric
    components = projection.components(weight)
    up, down = components.with_unit_columns()
    # What made the columns shorter has made the rows longer.
    stretched = components.up.square().sum(0)
    of_up = rows @ (rounding.rounded(up, dtype) - up).square() * projection.values.to(up.device) * stretched
    of_down = (rounding.rounded(down, dtype) - down).square() @ columns / stretched
    weight = weight.detach().double()
    whole = rows @ (rounding.rounded(weight, dtype) - weight).square() @ columns
    return torch.cat([of_up + of_down, whole[None]])
