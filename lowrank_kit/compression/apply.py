"""Put the planned factors into the model."""

import torch
from transformers import PreTrainedModel

from lowrank_kit.compression.decompose import Decomposition
from lowrank_kit.methods.base import Plan
from lowrank_kit.models.factored import replace_linear, share_down
from lowrank_kit.models.linear import weight_of


def factorise(model: PreTrainedModel, plan: Plan, decomposition: Decomposition) -> None:
    """Replace every matrix whose planned rank is below full by its factors, in place."""
    for group in decomposition.groups:
        first = group[0].name
        if plan.ranks[first] == group[0].full_rank:
            continue
        projection = decomposition.projection(first)
        # Members of a joint basis are factorised as one matrix, so that one `down` fits them all.
        stacked = torch.cat([weight_of(model.get_submodule(ref.name)) for ref in group])
        ups, down = projection.factors(stacked, plan.ranks[first])
        for ref, up in zip(group, ups.split(group[0].out_features), strict=True):
            replace_linear(model, ref.name, up, down)
        for ref in group[1:]:
            share_down(model, ref.name, first)
