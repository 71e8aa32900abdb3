"""Experts that transformers keeps as 3-D parameters, one for all: as linears of their own, and back."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from jaxtyping import Int64

from lowrank_kit.deferred import PreTrainedModel, Tensor
from lowrank_kit.models.layout import LinearRef, layout_of

if TYPE_CHECKING:
    from torch import nn

    from lowrank_kit.models.portable import ListedExperts


def list_experts(model: PreTrainedModel) -> None:
    """Make every expert's matrices linears of the model, in place, under the names that its layout gives them.

    The model computes what it did, up to rounding. The experts of one block are in memory twice for a while.
    """
    from lowrank_kit.models.portable import ListedExperts

    packed = dict.fromkeys(ref.name.rsplit(".", 2)[0] for ref in layout_of(model).linears if ref.packed)
    for name in packed:
        model.set_submodule(name, ListedExperts(model.get_submodule(name)).train(model.training))


def listed_experts(model: "nn.Module") -> "dict[str, ListedExperts]":
    """The modules whose experts are linears of their own, by path, in order of definition."""
    from lowrank_kit.models.portable import ListedExperts

    return {name: module for name, module in model.named_modules() if isinstance(module, ListedExperts)}


def with_factors(model: "nn.Module") -> list[str]:
    """The paths of those `listed_experts` of which a linear is factored."""
    from lowrank_kit.models.portable import LowRankLinear

    return [
        name
        for name, experts in listed_experts(model).items()
        if any(isinstance(module, LowRankLinear) for module in experts.modules())
    ]


def pack(weights: dict[str, Tensor], model: "nn.Module", listed: Collection[str]) -> None:
    """Put the family's own 3-D parameters in the place of the experts' in ``weights``, but for the modules ``listed``.

    ``weights`` are dense weights of ``model`` by name; what becomes one parameter is taken out.
    """
    for name, experts in listed_experts(model).items():
        if name not in listed:
            prefix = f"{name}."
            of_experts = [key for key in weights if key.startswith(prefix)]
            dense = {key.removeprefix(prefix): weights.pop(key) for key in of_experts}
            weights |= {prefix + part: weight for part, weight in experts.stock_weights(dense).items()}


def tokens_of(model: "nn.Module", ref: LinearRef) -> Int64[Tensor, " routed"]:
    """The tokens that the last pass sent to the expert of a linear, by number among all of the pass."""
    expert: Any = model.get_submodule(ref.name.rpartition(".")[0])
    tokens: Tensor = expert.tokens
    return tokens
