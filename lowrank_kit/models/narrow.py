"""Attention heads and MLP channels of a block: which weights each of them is made of, and how they are taken out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef, ModelLayout, layout_of
from lowrank_kit.models.linear import check_linear, weight_of

Kind = Literal["heads", "channels"]

# Which side of a linear holds a unit: rows of the weight are its outputs, columns its inputs.
_ROWS_OF: dict[Kind, tuple[str, ...]] = {"heads": ("q", "k", "v"), "channels": ("gate", "up")}
_COLUMNS_OF: dict[Kind, tuple[str, ...]] = {"heads": ("o",), "channels": ("down",)}


@dataclass(frozen=True)
class Units:
    """The units of one block that leave only whole: a key-value head with its query heads, or an MLP channel.

    Each of the ``count`` units owns an equal stretch of the rows of every linear in ``rows``, and of the columns of
    every one in ``columns``.
    """

    kind: Kind
    block: int
    count: int
    rows: tuple[LinearRef, ...]
    columns: tuple[LinearRef, ...]

    @property
    def name(self) -> str:
        """The name in a plan."""
        return f"block {self.block} {self.kind}"

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        """All linears that hold a part of every unit."""
        return self.rows + self.columns

    @property
    def cost(self) -> int:
        """Weights of one unit, biases left out."""
        return sum(ref.out_features * ref.in_features for ref in self.linears) // self.count

    def scores(self, elements: dict[str, Float[Tensor, "_ _"]]) -> Float[Tensor, " units"]:
        """Sum a score of every weight ``[out, in]``, by linear name, over the weights of each unit, in float64."""
        per_row = [elements[ref.name].sum(1, dtype=torch.float64) for ref in self.rows]
        per_column = [elements[ref.name].sum(0, dtype=torch.float64) for ref in self.columns]
        return torch.stack([scores.view(self.count, -1).sum(1) for scores in per_row + per_column]).sum(0)

    def sides(self, kept: int) -> Iterator[tuple[LinearRef, int, int]]:
        """Every linear with its ``(out, in)`` features once only ``kept`` units are left."""
        for ref in self.rows:
            yield ref, ref.out_features // self.count * kept, ref.in_features
        for ref in self.columns:
            yield ref, ref.out_features, ref.in_features // self.count * kept


def units_of(layout: ModelLayout, blocks: Sequence[int]) -> list[Units]:
    """The heads and the channels of these blocks. Raises `ConfigError` for a family that fuses or lacks q k v gate."""
    needed = {role for kind in _ROWS_OF for role in _ROWS_OF[kind] + _COLUMNS_OF[kind]}
    if needed != set(layout.roles):
        raise ConfigError(
            "heads and channels are taken out of blocks with separate q, k, v, o, gate, up and down matrices (llama, "
            f"mistral, qwen2, qwen3, gemma2, gemma3); this {layout.model_type} has {', '.join(layout.roles)}"
        )
    found = []
    for block in blocks:
        by_role = {ref.role: ref for ref in layout.linears if ref.block == block}
        counts = {"heads": by_role["k"].out_features // layout.head_dim, "channels": by_role["down"].in_features}
        for kind in _ROWS_OF:
            rows, columns = (tuple(by_role[role] for role in roles[kind]) for roles in (_ROWS_OF, _COLUMNS_OF))
            found.append(Units(kind, block, counts[kind], rows, columns))
    return found


def keep_units(model: PreTrainedModel, units: Units, kept: Sequence[int]) -> None:
    """Leave only these units, by number, in the model: its linears become narrower, in place."""
    for refs, side in ((units.rows, 0), (units.columns, 1)):
        for ref in refs:
            dense = check_linear(model.get_submodule(ref.name), ref.name)
            weight = weight_of(dense)
            # A bias belongs to the outputs: it goes with the rows and stays with the columns.
            bias = dense.bias
            stretches = torch.arange(weight.shape[side], device=weight.device).view(units.count, -1)
            index = stretches[list(kept)].flatten()
            if side == 0 and bias is not None:
                bias = bias[index]
            model.set_submodule(ref.name, _linear(weight.index_select(side, index), bias).train(dense.training))


def narrower_than(model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, list[int]]:
    """``[out, in]`` of the linears in the blocks that are not as the stock model has them, by module path."""
    pairs = zip(layout_of(model).linears, layout_of(stock).linears, strict=True)
    shapes = ((ref, [ref.out_features, ref.in_features], [old.out_features, old.in_features]) for ref, old in pairs)
    return {ref.name: shape for ref, shape, before in shapes if shape != before}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    options = {"device": weight.device, "dtype": weight.dtype}
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **options)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
