"""Which matrix keeps how much: a map of blocks and roles, and the kept ranks along the depth."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank_kit.models.layout import LinearRef
from lowrank_kit.plots.figure import Figure, integer_ticks, new_figure, panels, save
from lowrank_kit.storages.storage import Storage


def plot_rank_map(refs: Sequence[LinearRef], ranks: Mapping[str, int], storage: Storage, file: Path) -> Figure:
    """Draw the fraction of parameters that every linear keeps, blocks from left to right and roles downwards.

    A linear left dense (its rank is its full rank) keeps everything and is marked with a D; a cell without a
    linear stays empty, and one of several experts shows their mean.
    """
    roles = list(dict.fromkeys(ref.role for ref in refs))
    blocks = max(ref.block for ref in refs) + 1
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for ref in refs:
        cells[roles.index(ref.role), ref.block].append(_kept(ref, ranks[ref.name], storage))
    kept = np.full((len(roles), blocks), np.nan)
    for cell, found in cells.items():
        kept[cell] = np.mean(found)
    figure = new_figure(2.5 + 0.3 * blocks, 1.5 + 0.35 * len(roles))
    panel = figure.subplots()
    image = panel.imshow(kept, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    for role, block in cells:
        if kept[role, block] == 1:
            panel.text(block, role, "D", ha="center", va="center", fontsize=7)
    panel.set(xlabel="block", yticks=range(len(roles)), yticklabels=roles)
    integer_ticks(panel)
    figure.colorbar(image, label="parameters kept (D: left dense)")
    save(figure, file)
    return figure


def plot_kept_ranks(refs: Sequence[LinearRef], ranks: Mapping[str, int], file: Path) -> Figure:
    """Draw the rank of every linear over the blocks, one panel a role; hollow where it is left dense."""
    roles = list(dict.fromkeys(ref.role for ref in refs))
    figure, axes = panels(len(roles))
    for role, panel in zip(roles, axes, strict=True):
        group = [ref for ref in refs if ref.role == role]
        blocks, kept = [ref.block for ref in group], [ranks[ref.name] for ref in group]
        panel.plot(blocks, kept, color="tab:blue", linewidth=0.8)
        for ref, rank in zip(group, kept, strict=True):
            fill = "white" if rank == ref.full_rank else "tab:blue"
            panel.plot(ref.block, rank, "o", color="tab:blue", markerfacecolor=fill, markersize=4)
        panel.set(title=role, xlabel="block", ylabel="rank", ylim=(0, None))
        integer_ticks(panel)
    save(figure, file)
    return figure


def _kept(ref: LinearRef, rank: int, storage: Storage) -> float:
    if rank == ref.full_rank:
        return 1.0
    return storage.cost(ref.out_features, ref.in_features, rank) / ref.parameters
