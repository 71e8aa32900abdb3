"""How attention heads and MLP channels are taken out of a model."""

from collections.abc import Iterator, Sequence

from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, torch
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.models.units import Units


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
    return {ref.name: [ref.out_features, ref.in_features] for ref in _narrower(model, stock)}


def heads_by_block(model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, dict[str, int]]:
    """How many heads are left in every block that lost some, as ``per_layer_config`` of transformers has it.

    The model itself goes by the shapes of its linears; vLLM sizes each layer's cache by this.
    """
    names = {"query": "num_attention_heads", "key": "num_key_value_heads"}
    found: dict[str, dict[str, int]] = {}
    head_dim = layout_of(model).head_dim
    for ref in _narrower(model, stock):
        if ref.product in names:
            found.setdefault(str(ref.block), {})[names[ref.product]] = ref.out_features // head_dim
    return found


def _narrower(model: PreTrainedModel, stock: PreTrainedModel) -> Iterator[LinearRef]:
    for ref, old in zip(layout_of(model).linears, layout_of(stock).linears, strict=True):
        if (ref.out_features, ref.in_features) != (old.out_features, old.in_features):
            yield ref


def _linear(weight: Tensor, bias: Tensor | None) -> "nn.Linear":
    options = {"device": weight.device, "dtype": weight.dtype}
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **options)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
