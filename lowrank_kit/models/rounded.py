"""Linears whose weights are whole numbers of a few bits, in the place of plain ones."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lowrank_kit.deferred import Tensor, no_grad
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.rounding import Rounding

if TYPE_CHECKING:
    from torch import nn

    from lowrank_kit.models.portable import RoundedLinear
else:
    RoundedLinear = Any


@no_grad
def round_linear(model: "nn.Module", name: str, rounding: Rounding) -> None:
    """Round the weight of a linear; its bias is kept. Raises `LowRankKitError` for what is no plain linear."""
    linear = check_linear(model.get_submodule(name), name)
    model.set_submodule(name, _rounded(weight_of(linear), linear.bias, rounding, linear.weight))


@no_grad
def round_product(model: "nn.Module", name: str, factors: LowRankFactors, rounding: Rounding) -> None:
    """Put the rounded factors of a product in the place of a linear, with columns of ``up`` of one length."""
    from lowrank_kit.models import portable

    linear = check_linear(model.get_submodule(name), name)
    up, down = factors.with_unit_columns()
    layer = portable.LowRankLinear(down.shape[1], up.shape[0], factors.rank, device="meta")
    layer.set_submodule("down", _rounded(down, None, rounding, linear.weight))
    layer.set_submodule("up", _rounded(up, linear.bias, rounding, linear.weight))
    model.set_submodule(name, layer.train(linear.training))


def _rounded(weight: Tensor, bias: Tensor | None, rounding: Rounding, like: Tensor) -> RoundedLinear:
    """A rounded linear on the device of another weight, and with scales in its number format."""
    from lowrank_kit.models import portable

    codes, scale = rounding.codes(weight.to(like.device), like.dtype)
    return portable.RoundedLinear.from_codes(codes, scale, rounding.bits, rounding.group, bias)


def rounded_linears(model: "nn.Module") -> Iterator[tuple[str, RoundedLinear]]:
    """Every linear with a rounded weight by module path, halves of factored ones among them."""
    from lowrank_kit.models import portable

    return ((name, module) for name, module in model.named_modules() if isinstance(module, portable.RoundedLinear))


def roundings_of(model: "nn.Module") -> dict[str, list[int]]:
    """Bits and group of every rounded linear, by module path."""
    return {name: [module.bits, module.group] for name, module in rounded_linears(model)}
