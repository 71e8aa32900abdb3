"""How a compressed model is split over devices: the stock plan of tensor parallelism, for factors too."""

import re
from collections.abc import Mapping
from math import gcd
from typing import Any

from torch import nn


def tensor_parallel_plan(stock: Mapping[str, str] | None, lowrank: Mapping[str, Any]) -> dict[str, str] | None:
    """The rules of the stock plan, and before them those for the two factors of a linear that has one.

    Where the stock linear is split by its outputs ``up`` is, and by its inputs ``down``; the other factor is whole on
    every device. Rules for factors come first: transformers goes by the whole name, and vLLM by the first pattern that
    a name begins with. None, which in transformers makes the blocks whole on every device, where the outputs to be
    split are those of pivot rows, which are in no order, where weights are rounded, or where experts are linears of
    their own.
    """
    rules: dict[str, str] = {}
    if not stock or lowrank["experts"] or lowrank["rounded"]:
        return None
    for name in lowrank["ranks"]:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        for place, style in stock.items():
            if pattern != place and not pattern.endswith(f".{place}"):
                continue
            if "rowwise" in style:
                rules |= {f"{place}.down": style, f"{place}.up": "replicate"}
            elif name in lowrank["pivot_rows"]:
                return None
            else:
                rules |= {f"{place}.down": "replicate", f"{place}.up": style}
    return rules | dict(stock)


def check_heads(model: nn.Module, rules: Mapping[str, str], devices: int) -> None:
    """Raise `ValueError` where rules by concrete names would cut attention heads: transformers fails far from there.

    Blocks that lost heads may have another number of them than the configuration says.
    """
    modules, found = dict(model.named_modules()), {}
    for name, style in rules.items():
        module, owner = modules.get(name), name
        while owner and not isinstance(getattr(modules.get(owner), "head_dim", None), int):
            owner = owner.rpartition(".")[0]
        if style == "colwise" and owner and isinstance(module, nn.Linear):
            found[name] = module.out_features // int(modules[owner].head_dim)
    for name, heads in found.items():
        if heads % devices:
            every = gcd(*found.values())
            legal = ", ".join(str(size) for size in range(1, every + 1) if every % size == 0)
            raise ValueError(
                f"tensor parallelism over {devices} devices would cut heads of attention: {name} has {heads}; numbers "
                f"of devices that divide the heads of all layers: {legal}"
            )
