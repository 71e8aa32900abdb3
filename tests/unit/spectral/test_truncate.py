import numpy as np
import pytest
import torch

from lowrank_kit.spectral.moments import Moments
from lowrank_kit.spectral.truncate import (
    damped_root,
    input_projection,
    output_projection,
    output_projection_from_gram,
)

TOKENS = 400
SHAPES = [(24, 40), (40, 40), (64, 24)]


def activations(condition: str, n: int) -> torch.Tensor:
    """Inputs whose Gram has condition number 1e2, 1e15 or none at all (rank 2n/3)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n, dtype=torch.float64, generator=generator)
    mix = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    decades = {"well": 1.0, "1e15": 7.5, "deficient": 1.0}[condition]
    scales = torch.logspace(0, -decades, n, dtype=torch.float64)
    if condition == "deficient":
        scales[2 * n // 3 :] = 0
    return x * scales @ mix


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1])
    moments.update(x)
    return moments


def optimum(weight: torch.Tensor, x: torch.Tensor, rank: int) -> float:
    """Eckart-Young on the outputs themselves: no Gram, no root, no inverse."""
    values = np.linalg.svd((weight @ x.T).numpy(), compute_uv=False)
    return float((values[rank:] ** 2).sum())


def truncations(weight: torch.Tensor, x: torch.Tensor) -> dict[str, object]:
    found = {
        "output": output_projection(weight, moments_of(x)),
        "output Gram": output_projection_from_gram((weight @ x.T) @ (weight @ x.T).T),
    }
    if weight.shape[0] > weight.shape[1]:
        found["input"] = input_projection(moments_of(x).gram, weight.T @ weight)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("condition", ["well", "1e15", "deficient"])
def test_the_loss_is_the_optimum_to_one_in_a_million(condition, shape):
    weight, x = weight_of(shape), activations(condition, shape[1])
    total = optimum(weight, x, 0)
    for name, projection in truncations(weight, x).items():
        for rank in (1, 4, 8, 12, 16):
            up, down = projection.factors(weight, rank)
            loss = float(((weight - up @ down) @ x.T).square().sum())
            best = optimum(weight, x, rank)
            # Below this a loss is round-off of the outputs in float64.
            assert loss <= best * (1 + 1e-6) + 1e-22 * total, (name, rank, loss / best)
            assert projection.values[rank:].sum() == pytest.approx(best, rel=1e-4, abs=1e-14 * total)


def test_a_rank_deficient_input_is_reproduced_exactly_at_its_rank():
    weight, x = weight_of((40, 30)), activations("deficient", 30)
    for projection in truncations(weight, x).values():
        up, down = projection.factors(weight, 20)
        assert (up @ down @ x.T - weight @ x.T).norm() < 1e-12 * (weight @ x.T).norm()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_of_few_tokens_their_rank_reproduces_the_outputs_and_the_full_rank_the_weight(shape):
    weight, x = weight_of(shape), activations("well", shape[1])[:7]
    projection = output_projection(weight, moments_of(x))
    for rank, inputs in ((7, x), (min(shape), torch.eye(shape[1], dtype=torch.float64))):
        up, down = projection.factors(weight, rank)
        assert (inputs @ (weight - up @ down).T).norm() < 1e-6 * (inputs @ weight.T).norm()


def test_ranks_beyond_the_components_are_padded_with_zeros():
    weight, x = weight_of((40, 30)), activations("deficient", 30)
    up, down = input_projection(moments_of(x).gram, weight.T @ weight).factors(weight, 25)
    assert up.shape == (40, 25)
    assert not up[:, 20:].any()
    assert not down[20:].any()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_two_sided_truncation_is_the_svd_of_the_transformed_weight(shape):
    weight, x = weight_of(shape), activations("well", shape[1])
    g = torch.randn(TOKENS, shape[0], dtype=torch.float64) * torch.logspace(0, -1, shape[0], dtype=torch.float64)
    root_b = damped_root(g.T @ g, 1e-2)
    root_c = damped_root(x.T @ x, 0.0)
    u, s, vh = np.linalg.svd((root_b @ weight @ root_c).numpy())
    if shape[0] <= shape[1]:
        projection = output_projection(weight, moments_of(x), root_b)
    else:
        projection = input_projection(x.T @ x, weight.T @ (root_b @ root_b) @ weight)
    rank = 7
    reference = np.linalg.solve(root_b.numpy(), (u[:, :rank] * s[:rank]) @ vh[:rank]) @ np.linalg.inv(root_c.numpy())
    up, down = projection.factors(weight, rank)
    np.testing.assert_allclose((up @ down).numpy(), reference, rtol=0, atol=1e-8 * np.abs(reference).max())
    np.testing.assert_allclose(projection.values.sqrt().numpy(), s[: len(projection.values)], rtol=1e-8)


def test_a_diagonal_root_weights_the_outputs():
    weight, x = weight_of((24, 40)), torch.eye(40, dtype=torch.float64)
    rows = torch.logspace(0, -2, 24, dtype=torch.float64)
    projection = output_projection(weight, moments_of(x), rows)
    u, s, vh = np.linalg.svd((rows[:, None] * weight).numpy(), full_matrices=False)
    reference = (u[:, :5] * s[:5]) @ vh[:5] / rows[:, None].numpy()
    up, down = projection.factors(weight, 5)
    np.testing.assert_allclose((up @ down).numpy(), reference, rtol=0, atol=1e-10)


def test_components_are_equally_long_in_both_factors():
    weight, x = weight_of((24, 40)), activations("well", 40)
    up, down = output_projection(weight, moments_of(1e4 * x)).factors(weight, 10)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1))


def test_a_joint_basis_is_the_truncation_of_the_stacked_weights():
    first, second, x = weight_of((24, 40)), 2 * weight_of((24, 40)).flip(0), activations("well", 40)
    gram = moments_of(x).gram
    projection = input_projection(gram, first.T @ first + second.T @ second)
    stacked = torch.cat([first, second])
    parts = [tuple(projection.factors(weight, 9)) for weight in (first, second)]
    assert torch.allclose(*[p[1] / p[1].norm(dim=1, keepdim=True) for p in parts])
    joint = torch.cat([up @ down for up, down in parts])
    loss = float(((stacked - joint) @ x.T).square().sum())
    assert loss == pytest.approx(optimum(stacked, x, 9), rel=1e-6)


def test_weights_that_are_not_finite_are_refused():
    weight = weight_of((24, 40))
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        output_projection(weight, moments_of(activations("well", 40)))
