"""The modules of a stock model take their compressed form, without any weights."""

from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.models.portable.codes import RoundedLinear
from lowrank_kit.models.portable.linears import LowRankLinear, PivotLinear
from lowrank_kit.models.portable.packed_experts import ListedExperts
from lowrank_kit.models.portable.sliced import add_shortcuts


def give_form(base: nn.Module, lowrank: Mapping[str, Any]) -> None:
    """Make a base model what the entries say, in place; `ValueError`, with the entry, where it cannot be made so."""
    for name in lowrank["experts"]:
        base.set_submodule(name, ListedExperts(_named(base, name, "experts", nn.Module)))
    for name, (out_features, in_features) in lowrank["shapes"].items():
        stock = _named(base, name, "shapes", (nn.Linear, Conv1D))
        base.set_submodule(name, nn.Linear(in_features, out_features, **_like(stock)))
    for name in lowrank["shortcuts"]:
        _named(base, f"{name}.input_layernorm", "shortcuts", nn.Module)
        add_shortcuts(base.get_submodule(name))
    for name, rank in lowrank["ranks"].items():
        base.set_submodule(name, _factored(base, name, rank, lowrank["pivot_rows"].get(name)))
    for name in lowrank["pivot_rows"]:
        _named(base, name, "pivot_rows", PivotLinear)
    for name, (bits, group) in lowrank["rounded"].items():
        dense = _named(base, name, "rounded", (nn.Linear, Conv1D))
        weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        out_features, in_features = weight.shape
        base.set_submodule(name, RoundedLinear(in_features, out_features, bits, group, **_like(dense)))
    for name, owner in lowrank["shared_down"].items():
        ours, theirs = (_named(base, end, "shared_down", LowRankLinear).down.weight for end in (name, owner))
        if owner in lowrank["shared_down"] or ours.shape != theirs.shape:
            raise ValueError(f"lowrank.shared_down: {name} cannot share the factor of {owner}")
    _tell_apart(base, [*lowrank["ranks"], *lowrank["rounded"], *lowrank["experts"]])


def _factored(base: nn.Module, name: str, rank: int, pivot_rows: int | None) -> nn.Module:
    dense = _named(base, name, "ranks", (nn.Linear, Conv1D))
    weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
    out_features, in_features = weight.shape
    if rank > min(weight.shape):
        raise ValueError(f"lowrank.ranks: {rank} is no rank of {name}, which is {out_features}x{in_features}")
    build: Any = LowRankLinear
    if pivot_rows is not None:
        if pivot_rows > min(rank, out_features - 1):
            raise ValueError(
                f"lowrank.pivot_rows: {pivot_rows} is too many for {name}, {out_features} rows of rank {rank}"
            )
        build = partial(PivotLinear, pivot_rows=pivot_rows)
    layer: nn.Module = build(in_features, out_features, rank, **_like(dense))
    return layer


def _like(dense: Any) -> dict[str, Any]:
    # On the device of whoever builds the model: vLLM has put the parameters on meta already, and wants real buffers.
    return {"bias": dense.bias is not None, "dtype": dense.weight.dtype}


def _named(base: nn.Module, name: str, entry: str, kind: Any) -> Any:
    try:
        module = base.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, kind):
        raise ValueError(f"lowrank.{entry} names {name!r}, and the model has no such layer")
    return module


def _tell_apart(base: nn.Module, changed: Collection[str]) -> None:
    """Give modules some of whose children are not the stock ones a class for every pattern of them.

    vLLM looks at one module of a class to decide how all of them are run.
    """
    children: dict[str, list[str]] = {}
    for name in changed:
        parent, _, child = name.rpartition(".")
        children.setdefault(parent, []).append(child)
    for parent, names in children.items():
        module = base.get_submodule(parent)
        stock: Any = type(module)
        module.__class__ = _variant(stock, tuple(sorted(names)))


@cache
def _variant(stock: Any, changed: tuple[str, ...]) -> Any:
    """The same class once more, one for every ``changed``."""
    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "__doc__": stock.__doc__})
