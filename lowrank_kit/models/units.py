"""Attention heads and MLP channels of a block: which weights each of them is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import all_with, architecture_of
from lowrank_kit.models.layout import LinearRef, ModelLayout

UnitKind = Literal["heads", "channels"]
_KINDS: dict[str, UnitKind] = {"attention": "heads", "mlp": "channels"}


@dataclass(frozen=True)
class Units:
    """The units of one block that leave only whole: a key-value head with its query heads, or an MLP channel.

    Each of the ``count`` units owns an equal stretch of the rows of every linear in ``rows``, and of the columns of
    every one in ``columns``.
    """

    kind: UnitKind
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
        return sum(ref.parameters for ref in self.linears) // self.count

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
    """The heads and the channels of these blocks. Raises `ConfigError` for a family that cannot be narrowed."""
    if not architecture_of(layout.model_type).heads_follow_width:
        raise ConfigError(
            "heads and channels are taken out of blocks with separate q, k, v, o, gate, up and down matrices "
            f"({', '.join(all_with(lambda a: a.heads_follow_width))}); this {layout.model_type} has "
            f"{', '.join(layout.roles)}"
        )
    found = []
    for block in blocks:
        [key] = (ref for ref in layout.linears if (ref.block, ref.product) == (block, "key"))
        [down] = (ref for ref in layout.linears if ref.block == block and ref.kind == "mlp" and ref.writes_residual)
        found.append(_units("heads", layout, block, key.out_features // layout.head_dim))
        found.append(_units("channels", layout, block, down.in_features))
    return found


def channels_of(layout: ModelLayout) -> list[Units]:
    """The channels of every MLP, gated or not, whose matrices are separate; experts have none."""
    found = []
    for block in range(len(layout.blocks)):
        mlp = [ref for ref in layout.linears if (ref.block, ref.kind) == (block, "mlp")]
        downs = [ref for ref in mlp if ref.writes_residual]
        if len(downs) == 1 and all(ref.product != "fused" for ref in mlp):
            found.append(_units("channels", layout, block, downs[0].in_features))
    return found


def _units(name: UnitKind, layout: ModelLayout, block: int, count: int) -> Units:
    refs = [ref for ref in layout.linears if ref.block == block and _KINDS.get(ref.kind) == name]
    # Rows of a weight are its outputs, columns its inputs.
    rows = tuple(ref for ref in refs if not ref.writes_residual)
    return Units(name, block, count, rows, tuple(ref for ref in refs if ref.writes_residual))
