import pytest
import torch

from lowrank_kit.spectral.factors import LowRankFactors


@pytest.fixture
def factors():
    draw = torch.Generator().manual_seed(0)
    return LowRankFactors(
        torch.randn(7, 3, generator=draw, dtype=torch.float64), torch.randn(3, 5, generator=draw, dtype=torch.float64)
    )


def test_a_product_behaves_like_the_matrix_that_it_stands_for(factors):
    dense, inputs = factors.dense(), torch.eye(5, dtype=torch.float64)
    assert factors.shape == tuple(dense.shape) == (7, 5)
    assert factors.rank == torch.linalg.matrix_rank(dense) == 3
    assert factors.norm() == pytest.approx(float(torch.linalg.matrix_norm(dense)))
    torch.testing.assert_close(factors @ inputs, dense)
    up, down = factors
    assert up is factors.up
    assert down is factors.down


def test_the_norm_is_right_where_components_nearly_cancel():
    """1 x (1 + 2^-30) - 1 x 1 = 2^-30, whose square is lost beside 1."""
    down = torch.tensor([[1.0 + 2.0**-30], [-1.0]], dtype=torch.float64)
    factors = LowRankFactors(torch.ones(1, 2, dtype=torch.float64), down)
    assert factors.norm() == pytest.approx(2.0**-30, rel=1e-3, abs=0)


def test_balanced_factors_have_the_roots_of_the_singular_values(factors):
    found, s = factors.balanced(), torch.linalg.svdvals(factors.dense())[:3]
    torch.testing.assert_close(found.dense(), factors.dense())
    torch.testing.assert_close(found.up.T @ found.up, torch.diag(s))
    torch.testing.assert_close(found.down @ found.down.T, torch.diag(s))
