"""A model with fewer blocks: some dropped, or several collapsed into one."""

from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_kit.deferred import PretrainedConfig, PreTrainedModel, nn, no_grad
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.blocks import check_stand_alone
from lowrank_kit.models.layout import LinearRef, ModelLayout

NUMBERS = ("mlp_only_layers", "moe_layers")
"""Entries of configurations that list blocks by number: those without experts, and those with."""


def drop_blocks(model: PreTrainedModel, layout: ModelLayout, kept: Sequence[int]) -> None:
    """Leave only the blocks ``kept``, ascending indices, in place; afterwards `layout_of` names them anew.

    The configuration's number of blocks and its lists of one entry a block are cut to match, and attention layers
    are renumbered for the key-value cache: saved, this is a stock checkpoint with fewer blocks.
    Raises `ValueError` for indices that are not ascending, out of range or none, `ConfigError` for blocks
    that do not stand alone, `LowRankKitError` for an encoder-decoder model.
    """
    count = len(layout.blocks)
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(f"{kept} are not ascending indices of {count} blocks")
    check_stand_alone(layout, "removal of blocks")
    if len(layout.stacks) != 1:
        raise LowRankKitError(f"this {layout.model_type} has an encoder and a decoder: blocks go from one stack")
    blocks = [model.get_submodule(layout.blocks[index]) for index in kept]
    model.set_submodule(layout.blocks[0].rpartition(".")[0], nn.ModuleList(blocks))
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    _cut_config(model.config.get_text_config(), count, kept)


@no_grad
def scale_outputs(model: PreTrainedModel, refs: Iterable[LinearRef], factor: float) -> None:
    """Multiply what these linears give by a factor, in place: weights and biases, and those of experts kept as one."""
    modules: dict[str, Any] = {}
    for ref in refs:
        name = ref.name.rsplit(".", 2)[0] if ref.packed else ref.name
        modules[name] = model.get_submodule(name)
    for module in modules.values():
        own = ("weight", "bias") if hasattr(module, "weight") else ("down_proj", "down_proj_bias")
        for parameter in (getattr(module, part, None) for part in own):
            if parameter is not None:
                parameter.mul_(factor)


def _cut_config(config: PretrainedConfig, count: int, kept: Sequence[int]) -> None:
    _cut_experts(config, count, kept)
    for name, value in vars(config).items():
        if "layer" in name and name not in NUMBERS and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])
    # Qwen: the first blocks attend to everything, those from here on to a window.
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    config.num_hidden_layers = len(kept)


def _cut_experts(config: PretrainedConfig, count: int, kept: Sequence[int]) -> None:
    """Renumber the blocks that have experts, or have none."""
    for name in NUMBERS:
        numbers = getattr(config, name, None)
        if numbers is not None and getattr(config, "decoder_sparse_step", 1) != 1:
            # Qwen: every so many blocks, one has experts.
            numbers = [i for i in range(count) if i in numbers or (i + 1) % config.decoder_sparse_step != 0]
            config.decoder_sparse_step = 1
        if numbers is not None:
            setattr(config, name, [new for new, old in enumerate(kept) if old in numbers])


@no_grad
def collapse(base: "nn.Module", followers: "Sequence[nn.Module]") -> None:
    """Add every follower's difference to the base's parameters, in place: ``θ + Σ_k (θ_k − θ)``, summed in float64.

    Layer-difference merge of LaCo (arXiv 2402.11187, equation 1). All parameters take part, norms and biases too.
    One follower alone takes the base's place.
    """
    parameters = [dict(follower.named_parameters()) for follower in followers]
    for name, parameter in base.named_parameters():
        original = parameter.double()
        parameter.copy_(original + sum(theirs[name].double() - original for theirs in parameters))


@no_grad
def take_matrices(base: "nn.Module", follower: "nn.Module") -> None:
    """Give the base every matrix of the follower, in place; norms and biases stay its own.

    What the released code of LaCo does, for it adds every difference to the sum so far: ``θ + (θ_k − θ) = θ_k``.
    """
    theirs = dict(follower.named_parameters())
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(theirs[name])
