"""A compressed model in the form that servers and their kernels like: no shared parameters, ranks in round numbers."""

from lowrank_kit.deferred import PreTrainedModel, nn, no_grad, torch
from lowrank_kit.models.factored import factored_linears, shared_downs
from lowrank_kit.models.portable import LowRankLinear, PivotLinear


@no_grad
def make_servable(model: PreTrainedModel, multiple: int = 1) -> list[str]:
    """Write shared factors out, and fill ranks up with zeros to multiples of ``multiple``, in place.

    The model computes what it did: zeros are added to its sums. Returns the linears whose rank stays as it is,
    because with the next multiple the factors would be no smaller than the dense matrix.
    """
    shared, too_large = shared_downs(model), []
    for name, layer in list(factored_linears(model)):
        extra = -layer.rank % multiple
        if extra and _parameters(layer, layer.rank + extra) >= layer.in_features * layer.out_features:
            too_large.append(name)
            extra = 0
        if extra or name in shared:
            model.set_submodule(name, _with_zeros(layer, extra).train(layer.training))
    return too_large


def _parameters(layer: LowRankLinear, rank: int) -> int:
    return rank * (layer.in_features + layer.up.out_features)


def _with_zeros(layer: LowRankLinear, extra: int) -> LowRankLinear:
    """A copy with ``extra`` more rows of ``down`` and columns of ``up``, all zero."""
    down = nn.functional.pad(layer.down.weight, (0, 0, 0, extra))
    up = nn.functional.pad(layer.up.weight, (0, extra))
    if not isinstance(layer, PivotLinear):
        return LowRankLinear.from_factors(up, down, layer.dense_bias())
    # What up gives comes behind the new rows, which no output is taken from.
    index = torch.where(layer.index >= layer.rank, layer.index + extra, layer.index)
    return PivotLinear.from_pivots(down, up, index, layer.dense_bias())
