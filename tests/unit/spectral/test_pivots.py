"""Pivot rows against float64: nothing is lost, and no coefficient is much above 1."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.spectral.pivots import pivoted, spanning_rows


def drawn(out, width, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(out, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, width, generator=generator, dtype=torch.float64),
    )


def assert_the_same(factors, pivots):
    out, width = factors.shape
    assert pivots.rows.shape == (factors.rank, width)
    assert pivots.coefficients.shape == (out - factors.rank, factors.rank)
    assert pivots.rows.numel() + pivots.coefficients.numel() == factors.rank * (out + width - factors.rank)
    expected = factors.up.double().numpy() @ factors.down.double().numpy()
    stacked = np.concatenate([pivots.rows.numpy(), pivots.coefficients.numpy() @ pivots.rows.numpy()])
    found = stacked[pivots.index.numpy()]
    scale = np.abs(factors.up.double().numpy()) @ np.abs(factors.down.double().numpy())
    assert np.abs(found - expected).max() <= 1e-12 * scale.max()
    np.testing.assert_allclose(pivots.dense().numpy(), found, rtol=0, atol=1e-14 * scale.max())
    if pivots.coefficients.numel():
        assert pivots.coefficients.abs().max() <= 1.01


def powers(count):
    return 10.0 ** torch.linspace(-140, 140, count, dtype=torch.float64)


def repeated(up):
    return up[torch.arange(len(up)) % 3 % len(up)]


def gfpp(n):
    """Wright's and Wilkinson's matrix, on which partial pivoting lets entries double in every step."""
    matrix = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    matrix[:, -1] = 1
    return matrix


ADVERSARIES = {
    "plain": lambda up, down: (up, down),
    "rank-deficient up": lambda up, down: (up[:, :1].expand_as(up), down),
    "rank-deficient down": lambda up, down: (up, down[:1].expand_as(down)),
    "zero columns": lambda up, down: (torch.cat([up[:, :2], torch.zeros_like(up[:, 2:])], 1), down),
    "repeated rows": lambda up, down: (repeated(up), down),
    "zero rows": lambda up, down: (up * (torch.arange(len(up)) % 4 == 0)[:, None], down),
    "all zero": lambda up, down: (torch.zeros_like(up), down),
    "huge range of factors": lambda up, down: (up * powers(up.shape[1]), down / powers(up.shape[1])[:, None]),
    "huge range of components": lambda up, down: (up * powers(up.shape[1]), down),
    "huge range of rows": lambda up, down: (up * powers(len(up))[:, None], down),
    "one huge row": lambda up, down: (up * (1 + 1e12 * (torch.arange(len(up)) == 3))[:, None], down),
    "almost of rank 1": lambda up, down: (1e-13 * up + up[:, :1], down),
    "growth": lambda up, down: (torch.cat([gfpp(up.shape[1]), up[up.shape[1] :]]), down),
    "float32": lambda up, down: (up.float(), down.float()),
}


@pytest.mark.parametrize("shape", [(40, 24, 17), (24, 40, 23), (60, 60, 1), (97, 64, 60)])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_nothing_is_lost_and_coefficients_are_bounded(name, shape):
    factors = LowRankFactors(*ADVERSARIES[name](*drawn(*shape)))
    assert_the_same(factors, pivoted(factors))


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
def test_any_rank_and_any_repetition(out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    up, down = drawn(out, width, rank, data.draw(st.integers(0, 1000)))
    copies = data.draw(st.lists(st.integers(0, out - 1), min_size=out, max_size=out))
    factors = LowRankFactors(up[torch.tensor(copies)], down)
    assert_the_same(factors, pivoted(factors))


def test_the_volume_is_that_of_the_best_rows_up_to_the_known_factor():
    """A dominant submatrix is within k^(k/2) of the largest volume (Goreinov et al., theorem 6); here all are tried."""
    basis = torch.linalg.qr(drawn(12, 3, 3)[0]).Q
    found = basis[spanning_rows(basis)].det().abs()
    best = max(basis[list(rows)].det().abs() for rows in combinations(range(12), 3))
    assert best / 3**1.5 <= found <= best * (1 + 1e-12)
    assert found >= 0.9 * best


def test_it_is_the_same_whatever_the_basis():
    """The rows depend on the span alone, not on how singular values are shared between the factors."""
    up, down = drawn(50, 30, 12)
    mixed, _ = drawn(12, 12, 12, seed=1)
    one = pivoted(LowRankFactors(up, down))
    other = pivoted(LowRankFactors(up @ mixed, torch.linalg.solve(mixed, down)))
    torch.testing.assert_close(one.dense(), other.dense())


def test_members_of_a_stack_have_their_own_coefficients_for_common_rows():
    up, down = drawn(3 * 20, 24, 10)
    whole = pivoted(LowRankFactors(up, down))
    parts = list(whole.split(20))
    assert all(part.rows is whole.rows for part in parts)
    assert sum(len(part.coefficients) for part in parts) == 60 - 10
    for part, expected in zip(parts, (up @ down).split(20), strict=True):
        torch.testing.assert_close(part.dense(), expected)
