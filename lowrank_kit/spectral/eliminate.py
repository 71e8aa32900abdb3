"""Which inputs of a linear can leave, what that costs, and how the others make up for them.

The outputs `W x` of the channels x [n] lose least when a set of channels goes and W is refitted to those that stay, K:
`W' = W C_:K C_KK^-1`, at the cost `tr(M (C - C_:K C_KK^-1 C_K:))` with C the second moment of x and `M = W^T B W` the
metric B of the outputs as the channels see it. With B that of the loss's gradients the cost is in the units of a
two-sided truncation's tail; with `B = I` this is the Nystroem approximation of MoDeGPT (arXiv 2408.09632, section 3.3).

C is damped by a small share of its diagonal: the answer does not depend on the channels' units, and C may be singular.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64

from lowrank_kit.deferred import Tensor, torch

DAMPING = 1e-4
"""Share of a channel's own second moment that is added to it: above the round-off of a Gram of 10^4 channels in float32
products, below what any number of calibration tokens determines."""

STEPS_PER_PRODUCT = 64
"""Channels that go before the matrices are brought up to date by one product."""


@dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they leave, each the cheapest of those left, and what each adds to the cost."""

    order: Int64[Tensor, " n"]
    losses: Float64[Tensor, " n"]

    def kept(self, count: int) -> list[int]:
        """The channels that are left when all but so many have gone, ascending."""
        return self.order[len(self.order) - count :].sort().values.tolist()


def eliminate(inputs: Float[Tensor, "n n"], metric: Float[Tensor, "n n"]) -> Elimination:
    """Eliminate all channels one by one, given C and M; ``losses[:r].sum()`` is the cost of the first r.

    The step of Optimal Brain Surgeon: channel j costs `M_jj / (C^-1)_jj`, then W and C^-1 become those of the channels
    left, and M with W. Two matrices are updated by products of rank `STEPS_PER_PRODUCT`: with the inverse about
    `1.2 n^3` multiplications in float64, and four matrices `[n, n]` in memory. It takes about 3 s of one core for
    n = 1536, and by `n^3` some 15 minutes for n = 11008 (not measured).
    """
    scale, damped = _damped(inputs)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    metric = metric.double() * scale * scale[:, None]
    left = torch.arange(len(scale), device=scale.device)
    order, losses = [], []
    while len(left):
        steps = min(STEPS_PER_PRODUCT, len(left))
        gone, costs = _eliminate_some(inverse, metric, steps)
        order.append(left[gone])
        losses.append(costs)
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        left, inverse, metric = left[stays], inverse[stays][:, stays], metric[stays][:, stays]
    return Elimination(torch.cat(order), torch.cat(losses))


def compensated(
    weight: Float[Tensor, "out n"], inputs: Float[Tensor, "n n"], kept: Sequence[int]
) -> Float64[Tensor, "out k"]:
    """`W C_:K C_KK^-1`: the weight of the channels that stay, in float64."""
    scale, damped = _damped(inputs)
    index = torch.tensor(kept, device=scale.device)
    seen = damped[index]
    root = torch.linalg.cholesky(seen[:, index])
    shares = torch.cholesky_solve(seen @ (weight.detach().double() * scale).T, root).T
    # A channel that is always zero may have any weight.
    return torch.where(scale[index] > 0, shares / scale[index], weight[:, index].double())


def _damped(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The root mean square of every channel, and C in these units, damped; a channel of zeros is one of its own."""
    inputs = inputs.double()
    scale = inputs.diagonal().clamp(min=0).sqrt()
    unit = torch.where(scale > 0, 1 / scale, 0.0)
    damped = inputs * unit * unit[:, None]
    damped.diagonal().fill_(1 + DAMPING)
    return scale, damped


def _eliminate_some(inverse: Tensor, metric: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Eliminate ``steps`` channels and update both matrices, in place; return who went and at what cost.

    When j goes, with `a = (C^-1)_:j / (C^-1)_jj`: `W -= W_j a^T`, `C^-1 -= (C^-1)_jj a a^T`, and `M -= a w^T + w a^T`
    with `w = M_:j - M_jj a / 2`. Only the diagonals are kept up to date; the rows of j are made when j goes.
    """
    shares, moves = (inverse.new_zeros(steps, len(inverse)) for _ in range(2))
    pivots = inverse.new_zeros(steps)
    precision, energy = inverse.diagonal().clone(), metric.diagonal().clone()
    gone, costs = [], []
    for step in range(steps):
        found = torch.min(energy.clamp(min=0) / precision, 0)
        j = int(found.indices)
        gone.append(j)
        costs.append(found.values)
        a, w = shares[:step], moves[:step]
        column = inverse[j] - (pivots[:step] * a[:, j]) @ a
        pivots[step] = column[j]
        shares[step] = share = column / column[j]
        row = metric[j] - w[:, j] @ a - a[:, j] @ w
        moves[step] = moved = row - row[j] / 2 * share
        precision -= column[j] * share.square()
        energy -= 2 * share * moved
        # Gone: the cost of going again is infinite.
        precision[gone], energy[gone] = 1.0, torch.inf
    inverse -= (shares * pivots[:, None]).T @ shares
    product = shares.T @ moves
    metric -= product + product.T
    return torch.tensor(gone, device=inverse.device), torch.stack(costs)
