"""First-order effect on the loss of the components of a weight, from one gradient `G = dL/dW`."""

from jaxtyping import Float

from lowrank_kit.deferred import Tensor
from lowrank_kit.spectral.factors import LowRankFactors


def sigma_gradient(
    u: Float[Tensor, "out r"], v: Float[Tensor, "in r"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, " r"]:
    """`dL/dsigma_k = u_k^T G v_k` for `W = sum_k sigma_k u_k v_k^T`; no special layer is needed."""
    return (u * (gradient @ v)).sum(0)


def drop_change(components: LowRankFactors, gradient: Float[Tensor, "out in"]) -> Float[Tensor, " r"]:
    """First-order change of the loss when component k is dropped from `W = sum_k up_k down_k`: `-up_k^T G down_k^T`.

    Of a singular component that is `-sigma_k u_k^T G v_k`, of the projection on u_k `-(u_k^T W)(G^T u_k)`.
    """
    return -sigma_gradient(components.up, components.down.T, gradient)
