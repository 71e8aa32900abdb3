"""What the blocks of a model cost, and how many have to go to meet a budget. Reads shapes, no weights."""

from collections.abc import Collection
from itertools import accumulate
from math import floor

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.architectures import Joining, architecture_of
from lowrank_kit.models.layout import ModelLayout


def block_sizes(layout: ModelLayout) -> list[int]:
    """Return the parameters of every block's linears, biases not counted."""
    sizes = [0] * len(layout.blocks)
    for ref in layout.linears:
        sizes[ref.block] += ref.parameters
    return sizes


def ranks_with(layout: ModelLayout, kept: Collection[int]) -> dict[str, int]:
    """Return the rank of every linear by name, full in the blocks ``kept``, 0 in those that go."""
    return {ref.name: ref.full_rank if ref.block in kept else 0 for ref in layout.linears}


def check_stand_alone(layout: ModelLayout, what: str) -> None:
    """Raise `ConfigError` where blocks read more of earlier ones than hidden states, and so cannot have ``what``."""
    if not architecture_of(layout.model_type).blocks_stand_alone:
        raise ConfigError(
            f"blocks of this {layout.model_type} read keys and values that earlier ones computed, so there is no "
            f"{what}: choose a method without (svd_llm)"
        )


def joining_of(layout: ModelLayout) -> Joining:
    """How what blocks write reaches the residual stream. A causal model without a final norm has norms of the sums."""
    return "normed" if layout.final_norm is None else architecture_of(layout.model_type).joining


def check_joining(layout: ModelLayout, what: str, *legal: Joining) -> None:
    """Raise `ConfigError` where ``what`` cannot be merged into the weights that write to the residual stream."""
    if (joining := joining_of(layout)) not in legal:
        does = {"normed": "puts norms behind", "scaled": "scales"}[joining]
        raise ConfigError(
            f"{what} changes what blocks write to the residual stream, and this {layout.model_type} {does} that: use "
            "method=shortgpt"
        )


def fewest_blocks(layout: ModelLayout, budget: int) -> int:
    """Return how many blocks have to go until the others' linears have at most ``budget`` parameters.

    Raises `ConfigError` where that is all of them, or none can go.
    """
    check_stand_alone(layout, "removal of blocks")
    sizes = block_sizes(layout)
    # Smallest first: whichever blocks go, so many are enough.
    gone = accumulate(sorted(sizes))
    count = next(count for count, size in enumerate(gone, start=1) if sum(sizes) - size <= budget)
    if count == len(sizes):
        largest = 1 - max(sizes) / sum(sizes)
        raise ConfigError(
            f"all {count} blocks would have to go: without them this {layout.model_type} has no linears left; lower "
            f"method.ratio to {floor(largest * 1e4) / 1e4:g}, which leaves one block"
        )
    return count
