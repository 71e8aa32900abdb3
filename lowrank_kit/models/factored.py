"""How factors take a dense layer's place in a model, and which linears of a model are factored."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_kit.deferred import nn
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.pivots import PivotFactors

if TYPE_CHECKING:
    from lowrank_kit.models.portable import LowRankLinear
else:
    LowRankLinear = Any


def replace_linear(model: "nn.Module", name: str, factors: LowRankFactors) -> LowRankLinear:
    """Put the factors in the place of the linear ``name``; its dtype, device, bias and mode are kept.

    Raises `LowRankKitError` where ``name`` is no plain linear layer, `ValueError` for factors that do not fit it.
    """
    from lowrank_kit.models import portable

    return _replace(model, name, factors.shape, partial(portable.LowRankLinear.from_factors, factors.up, factors.down))


def replace_by_pivots(model: "nn.Module", name: str, factors: PivotFactors) -> LowRankLinear:
    """As `replace_linear`, with a product that is stored by its rows."""
    from lowrank_kit.models import portable

    build = partial(portable.PivotLinear.from_pivots, factors.rows, factors.coefficients, factors.index)
    return _replace(model, name, factors.shape, build)


def _replace(
    model: "nn.Module", name: str, shape: tuple[int, int], build: Callable[..., LowRankLinear]
) -> LowRankLinear:
    dense = check_linear(model.get_submodule(name), name)
    weight = weight_of(dense)
    if shape != tuple(weight.shape):
        raise ValueError(f"factors of a {shape} matrix do not fit '{name}' {tuple(weight.shape)}")
    layer = build(bias=dense.bias, device=weight.device, dtype=weight.dtype)
    model.set_submodule(name, layer.train(dense.training))
    return layer


def share_down(model: "nn.Module", name: str, owner: str) -> None:
    """Let the factored linear ``name`` use the ``down`` weight of ``owner``, as one parameter (basis sharing)."""
    from lowrank_kit.models import portable

    layer, source = model.get_submodule(name), model.get_submodule(owner)
    if not isinstance(layer, portable.LowRankLinear) or not isinstance(source, portable.LowRankLinear):
        raise ValueError(f"'{name}' and '{owner}' must both be factored before they share a factor")
    if layer.down.weight.shape != source.down.weight.shape:
        raise ValueError(f"'{name}' (rank {layer.rank}) cannot share the factor of '{owner}' (rank {source.rank})")
    layer.down.weight = source.down.weight


def factored_linears(model: "nn.Module") -> Iterator[tuple[str, LowRankLinear]]:
    """Every factored linear of the model by module path, in order of definition."""
    from lowrank_kit.models import portable

    return ((name, module) for name, module in model.named_modules() if isinstance(module, portable.LowRankLinear))


def ranks_of(model: "nn.Module") -> dict[str, int]:
    """The rank of every factored linear, by module path; dense linears are not listed."""
    return {name: layer.rank for name, layer in factored_linears(model)}


def pivot_rows_of(model: "nn.Module") -> dict[str, int]:
    """For every linear that is stored by its rows, by module path: how many of them are among the pivots."""
    return {name: layer.pivot_rows for name, layer in factored_linears(model) if layer.pivot_rows is not None}


def shared_downs(model: "nn.Module") -> dict[str, str]:
    """For every linear whose ``down`` weight is another one's: that other, the first to hold it."""
    owners: dict[int, str] = {}
    # A rounded weight is made anew for whoever asks; what it is made of stays.
    held = {name: next(iter(layer.down.state_dict(keep_vars=True).values())) for name, layer in factored_linears(model)}
    found = {name: owners.setdefault(id(tensor), name) for name, tensor in held.items()}
    return {name: owner for name, owner in found.items() if name != owner}
