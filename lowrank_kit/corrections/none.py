"""No correction: every matrix is replaced by its own truncation."""

from collections.abc import Sequence
from typing import Literal

from lowrank_kit.corrections.correction import Correction, Factorisation
from lowrank_kit.deferred import torch
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.streamed import weights_of
from lowrank_kit.models.units import Units


class Uncorrected(Correction):
    """The factors of the decomposition as they are, and its weights for the channels that stay."""

    kind: Literal["none"] = "none"
    """Marks the correction."""

    def factorise(self, work: Factorisation) -> None:
        """See `Correction`."""
        model, plan = work.model, work.plan
        blocks = layout_of(model).blocks
        groups: dict[int, list[Sequence[LinearRef]]] = {index: [] for index in range(len(blocks))}
        for group in work.decomposition.groups:
            first = group[0]
            if first.name not in work.narrowed and (
                plan.ranks[first.name] < first.full_rank or first.name in plan.bits
            ):
                groups[first.block].append(group)
        narrowed = {units.block: units for units in work.narrowed.values()}
        weights = weights_of(model)
        weights.go_on(work.made_of)
        for index, of_block in groups.items():
            if weights.is_written(index):
                refs = [ref for group in of_block for ref in group]
                work.outline([*refs, *(narrowed[index].linears if index in narrowed else ())])
                continue
            with weights.block(index):
                self._factorise_block(work, of_block, narrowed.get(index))
                weights.write(index)

    def _factorise_block(
        self, work: Factorisation, groups: Sequence[Sequence[LinearRef]], narrowed: Units | None
    ) -> None:
        model, plan = work.model, work.plan
        if narrowed is not None:
            weight = weight_of(model.get_submodule(narrowed.columns[0].name))
            work.narrow(narrowed, work.decomposition.narrowed(narrowed, weight, plan.kept[narrowed.name]))
        for group in groups:
            first = group[0]
            if (rank := plan.ranks[first.name]) == first.full_rank:
                work.round(first.name)
                continue
            projection = work.decomposition.projection(first.name)
            # Members of a joint basis are factorised as one matrix, so that one `down` fits them all.
            stacked = torch.cat([weight_of(model.get_submodule(ref.name)) for ref in group])
            work.put([ref.name for ref in group], projection.factors(stacked, rank))
