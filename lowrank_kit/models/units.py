"""Attention heads and MLP channels of a block: which weights each of them is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef, ModelLayout

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
