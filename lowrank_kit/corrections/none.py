"""No correction: every matrix is replaced by its own truncation."""

from typing import Literal

from lowrank_kit.corrections.base import Correction, Factorisation
from lowrank_kit.deferred import torch
from lowrank_kit.models.factored import replace_linear, share_down
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors


class Uncorrected(Correction):
    """The factors of the decomposition as they are."""

    kind: Literal["none"] = "none"
    """Marks the correction."""

    def factorise(self, work: Factorisation) -> None:
        """See `Correction`."""
        model, plan = work.model, work.plan
        for group in work.decomposition.groups:
            first = group[0].name
            if plan.ranks[first] == group[0].full_rank:
                continue
            projection = work.decomposition.projection(first)
            # Members of a joint basis are factorised as one matrix, so that one `down` fits them all.
            stacked = torch.cat([weight_of(model.get_submodule(ref.name)) for ref in group])
            ups, down = projection.factors(stacked, plan.ranks[first])
            for ref, up in zip(group, ups.split(group[0].out_features), strict=True):
                replace_linear(model, ref.name, LowRankFactors(up, down))
            for ref in group[1:]:
                share_down(model, ref.name, first)
