"""First-order effect on the loss of the components of a weight, from one gradient `G = dL/dW`."""

from jaxtyping import Float
from torch import Tensor


def sigma_gradient(
    u: Float[Tensor, "out r"], v: Float[Tensor, "in r"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, " r"]:
    """`dL/dsigma_k = u_k^T G v_k` for `W = sum_k sigma_k u_k v_k^T`; no special layer is needed."""
    return (u * (gradient @ v)).sum(0)


def singular_drop_change(
    u: Float[Tensor, "out r"],
    sigma: Float[Tensor, " r"],
    v: Float[Tensor, "in r"],
    gradient: Float[Tensor, "out in"],
) -> Float[Tensor, " r"]:
    """First-order change of the loss when component k is dropped: `-sigma_k u_k^T G v_k`."""
    return -sigma * sigma_gradient(u, v, gradient)


def projection_drop_change(
    u: Float[Tensor, "out r"], weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, " r"]:
    """First-order change when `u_k u_k^T W` is dropped from `W = U U^T W`: `-(u_k^T W)(G^T u_k)`."""
    return -((u.T @ weight) * (u.T @ gradient)).sum(1)
