"""What no rule decides: blocks and roles that stay uniform or dense, and floors by block influence."""

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.config import Section
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError, did_you_mean
from lowrank_kit.models.layout import LinearRef


class Keep(Section):
    """Matrices that a rule leaves alone, and a floor for those that it decides.

    A matrix is held where its block or its role is named. Rules that read spectra alone take most from the first block,
    whose activations are small and whose errors are dear.
    """

    blocks: tuple[int, ...] = ()
    """Blocks to hold, by index; -1 is the last one."""
    roles: tuple[str, ...] = ()
    """Roles to hold."""
    at: Literal["uniform", "dense"] = "uniform"
    """`uniform`: what is held keeps the same fraction as the whole. `dense`: it is not cut, and the others pay."""
    influence: Annotated[float, Field(ge=0, le=1)] = 0.0
    """No rank below this share of the uniform one times the influence of its block, 1 - cos(h, h') (ShortGPT), relative
    to the largest influence of a block. Needs one more forward pass; 0: no such floor."""

    def check(self, roles: Sequence[str], blocks: int) -> None:
        """Raise `ConfigError` for a role that is not compressed or a block that the model does not have."""
        for role in self.roles:
            if role not in roles:
                raise ConfigError(
                    f"method.allocation.keep.roles: no linear of role '{role}' is compressed{did_you_mean(role, roles)}"
                )
        for block in self.blocks:
            if not -blocks <= block < blocks:
                raise ConfigError(
                    f"method.allocation.keep.blocks={block}: the model has {blocks} blocks; legal: {-blocks} to "
                    f"{blocks - 1}"
                )

    def holds(self, members: Sequence[LinearRef], blocks: int) -> bool:
        """Whether a matrix (or the members of a joint basis) of a model with so many blocks is held."""
        named = {block % blocks for block in self.blocks}
        return any(ref.role in self.roles or ref.block in named for ref in members)

    def floors(self, influence: Float64[Tensor, " blocks"] | None) -> dict[int, float]:
        """The floor of every block, as a share of the uniform rank."""
        if influence is None:
            return {}
        # Rounding may leave the influence of a block that does nothing a hair below zero.
        shares = influence.clamp(min=0) / influence.max().clamp(min=1e-12)
        return {block: self.influence * share for block, share in enumerate(shares.tolist())}
