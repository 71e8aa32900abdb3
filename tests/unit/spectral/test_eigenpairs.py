import numpy as np
import pytest
import scipy.linalg
import torch

from lowrank_kit.spectral import eigenpairs
from lowrank_kit.spectral.eigenpairs import (
    complete_basis,
    eigenvalues,
    eigh,
    fix_signs,
    numerical_rank,
    output_eigenpairs,
    output_eigenvalues,
    partial_eigh,
    random_orthonormal,
    range_eigenpairs,
    svd,
)
from lowrank_kit.spectral.moments import Moments


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_with(values, seed=0):
    basis = random_orthonormal(len(values), len(values), seed)
    return basis * torch.as_tensor(values, dtype=torch.float64) @ basis.T


def moments_of(x):
    moments = Moments.zeros(x.shape[-1])
    moments.update(x)
    return moments


def assert_orthonormal(vectors, tolerance=1e-10):
    identity = np.eye(vectors.shape[1])
    np.testing.assert_allclose(vectors.T @ vectors, identity, atol=tolerance)


def assert_same_span(a, b, tolerance=1e-8):
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=tolerance)


def assert_signs_fixed(vectors):
    leading = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (leading > 0).all()


def test_eigh_matches_scipy_in_descending_order():
    gram = gram_with(np.logspace(0, -6, 40))
    pairs = eigh(gram)
    np.testing.assert_allclose(pairs.values, scipy.linalg.eigvalsh(gram)[::-1], rtol=1e-9)
    np.testing.assert_allclose(gram @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-13)
    np.testing.assert_allclose(eigenvalues(gram), pairs.values, rtol=1e-9)
    assert_orthonormal(pairs.vectors, 1e-13)
    assert_signs_fixed(pairs.vectors)


def test_eigh_uses_the_symmetric_part_and_clips_round_off_below_zero():
    gram = gram_with([1.0] * 5 + [0.0] * 15)
    skew = normal(20, 20) * 1e-3
    pairs = eigh(gram + skew - skew.T)
    np.testing.assert_allclose(pairs.values, [1.0] * 5 + [0.0] * 15, atol=1e-14)
    assert (pairs.values >= 0).all()


def test_non_finite_entries_are_named():
    gram = torch.eye(4)
    gram[1, 2] = float("inf")
    for function in (eigh, eigenvalues, svd, lambda g: partial_eigh(g, 0, 1)):
        with pytest.raises(ValueError, match="1 of 16 matrix entries are not finite"):
            function(gram)


@pytest.mark.parametrize("span", [(0, 3), (20, 24), (57, 60), (0, 60), (10, 50), (5, 5)])
def test_partial_eigh_is_the_slice_of_the_full_one(span):
    gram = gram_with(np.logspace(0, -3, 60))
    pairs, full = partial_eigh(gram, *span), eigh(gram)
    np.testing.assert_allclose(pairs.values, full.values[slice(*span)], rtol=1e-11)
    np.testing.assert_allclose(pairs.vectors, full.vectors[:, slice(*span)], atol=1e-9)


@pytest.mark.parametrize("span", [(-1, 3), (3, 2), (0, 5)])
def test_partial_eigh_names_the_legal_span(span):
    with pytest.raises(ValueError, match="0 <= start <= stop <= 4"):
        partial_eigh(torch.eye(4), *span)


@pytest.mark.parametrize("gram", [torch.zeros(40, 40), torch.eye(40), torch.ones(40, 40)])
def test_partial_eigh_of_repeated_eigenvalues_is_orthonormal(gram):
    for span in ((0, 6), (34, 40)):
        pairs = partial_eigh(gram, *span)
        assert_orthonormal(pairs.vectors, 1e-12)
        np.testing.assert_allclose(gram.double() @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-12)


def test_condition_1e12_tail_subspace_is_found():
    values = np.concatenate([np.logspace(0, -6, 50), np.full(10, 1e-12) * np.linspace(1, 2, 10)])
    basis = random_orthonormal(60, 60, 0)
    pairs = partial_eigh(gram_with(values), 50, 60)
    assert_orthonormal(pairs.vectors, 1e-12)
    assert_same_span(pairs.vectors, basis[:, 50:])


def test_signs_are_invariant_to_flips_and_to_near_ties():
    vectors = normal(30, 8)
    assert torch.equal(fix_signs(vectors), fix_signs(-vectors))
    tie = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], dtype=torch.float64)
    for seed in range(10):
        assert fix_signs(-tie + 1e-12 * normal(4, 1, seed=seed))[0, 0] > 0
    assert torch.equal(fix_signs(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("rank", [0, 1, 17, 64])
def test_numerical_rank_of_a_float64_gram(rank):
    factor = normal(64, rank)
    assert numerical_rank(eigenvalues(factor @ factor.T), 64) == rank


@pytest.mark.parametrize("tokens", [200, 20_000])
def test_rank_of_outputs_in_a_subspace_from_float32_activations(tokens):
    weight = (normal(96, 48) @ normal(48, 96, seed=1)).float()
    x = normal(tokens, 96, seed=2).float()
    collected = eigenvalues(moments_of(x @ weight.T).gram)
    eps = torch.finfo(torch.float32).eps
    assert numerical_rank(collected, 96, 2 * eps) == 48
    noise = float(collected[48] / collected[0])
    assert noise < eps
    assert numerical_rank(output_eigenvalues(weight, moments_of(x)), 96) == 48


@pytest.mark.parametrize("which", ["largest", "middle", "smallest"])
@pytest.mark.parametrize("rank", [30, 80])
@pytest.mark.parametrize("count", [1, 6, 25, None])
def test_range_eigenpairs_select_inside_the_numerical_range(which, rank, count):
    gram = gram_with([*np.linspace(2, 1, rank), *[0.0] * (80 - rank)])
    size = rank if count is None else count
    start = {"largest": 0, "middle": (rank - size) // 2, "smallest": rank - size}[which]
    pairs, full = range_eigenpairs(gram, count, which), eigh(gram)
    np.testing.assert_allclose(pairs.values, full.values[start : start + size], rtol=1e-11)
    np.testing.assert_allclose(pairs.vectors, full.vectors[:, start : start + size], atol=1e-9)


@pytest.mark.parametrize("which", ["largest", "middle", "smallest"])
@pytest.mark.parametrize("count", [3, 40])
def test_a_range_smaller_than_asked_comes_back_whole(which, count):
    assert range_eigenpairs(gram_with([2.0, 1.0] + [0.0] * 58), count, which).values.shape == (2,)
    assert range_eigenpairs(torch.zeros(60, 60), count, which).vectors.shape == (60, 0)
    assert range_eigenpairs(torch.eye(60), count, which, rank_bound=2).values.shape == (2,)


def test_few_smallest_pairs_of_a_full_rank_gram_take_one_partial_decomposition(monkeypatch):
    solved = []
    solve = eigenpairs._solve
    monkeypatch.setattr(eigenpairs, "_solve", lambda *a: solved.append(a[1]) or solve(*a))
    monkeypatch.setattr(eigenpairs, "eigenvalues", None)
    range_eigenpairs(gram_with(np.linspace(2, 1, 60)), 5, "smallest")
    assert solved == [(0, 4)]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (40, 12), (13, 12)])
@pytest.mark.parametrize("biased", [False, True])
def test_output_eigenpairs_are_those_of_the_output_gram(shape, biased):
    out, width = shape
    weight, x = normal(out, width), normal(100, width, seed=1) + 0.5
    bias = normal(out, seed=2) if biased else None
    y = x @ weight.T + (0 if bias is None else bias)
    pairs, direct = output_eigenpairs(weight, moments_of(x), bias), eigh(y.T @ y)
    rank = min(out, width + biased)
    assert pairs.vectors.shape == (out, rank)
    np.testing.assert_allclose(pairs.values, direct.values[:rank], rtol=1e-9)
    np.testing.assert_allclose(pairs.vectors, direct.vectors[:, :rank], atol=1e-8)
    np.testing.assert_allclose(output_eigenvalues(weight, moments_of(x), bias), pairs.values, rtol=1e-9)
    assert_signs_fixed(pairs.vectors)


@pytest.mark.parametrize("which", ["largest", "middle", "smallest"])
def test_captured_energy_is_the_sum_of_the_chosen_eigenvalues(which):
    weight, x = normal(60, 24), normal(200, 24, seed=1) * torch.logspace(0, -3, 24, dtype=torch.float64)
    pairs = output_eigenpairs(weight, moments_of(x), count=4, which=which)
    captured = (x @ weight.T @ pairs.vectors).square().sum()
    np.testing.assert_allclose(captured, pairs.values.sum(), rtol=1e-8)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_condition_1e12_inputs_give_orthonormal_vectors_inside_the_reach_of_the_weight(shape):
    weight = normal(*shape)
    x = normal(400, shape[1], seed=1) * torch.logspace(0, -6, shape[1], dtype=torch.float64)
    for count in (None, 3):
        pairs = output_eigenpairs(weight, moments_of(x), count=count, which="smallest")
        assert_orthonormal(pairs.vectors, 1e-12)
        outside = pairs.vectors - weight @ torch.linalg.lstsq(weight, pairs.vectors).solution
        np.testing.assert_allclose(outside, 0, atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_truncation_to_the_largest_pairs_is_optimal(shape):
    weight = normal(*shape)
    x = normal(400, shape[1], seed=1) * torch.logspace(0, -4, shape[1], dtype=torch.float64)
    vectors = output_eigenpairs(weight, moments_of(x), count=8).vectors
    loss = ((weight - vectors @ vectors.T @ weight) @ x.T).square().sum()
    optimum = np.square(scipy.linalg.svdvals((weight @ x.T).numpy())[8:]).sum()
    np.testing.assert_allclose(loss, optimum, rtol=1e-9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_channels_bound_the_rank(shape, tokens):
    weight, x = normal(*shape), normal(tokens, shape[1], seed=1).float()
    for which in ("largest", "smallest"):
        pairs = output_eigenpairs(weight, moments_of(x), which=which)
        assert_orthonormal(pairs.vectors)
        outputs = scipy.linalg.orth((weight @ x.double().T).numpy())
        assert_same_span(pairs.vectors, torch.from_numpy(outputs), 1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_dead_rows_constant_inputs_and_dead_layers(shape):
    out, width = shape
    weight = normal(*shape)
    weight[: out // 2] = 0
    pairs = output_eigenpairs(weight, moments_of(normal(200, width, seed=1)))
    assert pairs.values.shape == (min(out - out // 2, width),)
    np.testing.assert_allclose(pairs.vectors[: out // 2], 0, atol=1e-12)
    constant = torch.ones(64, width, dtype=torch.float64)
    assert output_eigenpairs(weight, moments_of(constant), weight[:, 0]).values.shape == (1,)
    assert output_eigenpairs(weight, moments_of(0 * constant)).values.shape == (0,)


def test_bfloat16_weight_is_taken_at_its_exact_values():
    weight, inputs = normal(20, 12).bfloat16(), moments_of(normal(50, 12, seed=1))
    pairs, exact = output_eigenpairs(weight, inputs), output_eigenpairs(weight.double(), inputs)
    assert torch.equal(pairs.vectors, exact.vectors)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_svd_rebuilds_the_weight_with_fixed_signs(shape):
    weight = normal(*shape)
    u, s, vh = svd(weight)
    np.testing.assert_allclose(u * s @ vh, weight, atol=1e-13)
    np.testing.assert_allclose(s, scipy.linalg.svdvals(weight.numpy()), rtol=1e-12)
    assert_signs_fixed(u)
    np.testing.assert_allclose(svd(-weight)[0], u, atol=1e-10)


@pytest.mark.parametrize(("n", "k", "count"), [(20, 5, 15), (20, 5, 1), (20, 0, 20), (20, 20, 0)])
def test_complete_basis_is_an_orthonormal_complement(n, k, count):
    vectors = random_orthonormal(n, k, 0)
    further = complete_basis(vectors, count)
    assert further.shape == (n, count)
    assert_orthonormal(torch.cat([vectors, further], 1), 1e-13)
    assert torch.equal(further, complete_basis(vectors, count))


def test_complete_basis_says_how_many_are_left():
    with pytest.raises(ValueError, match="15 are left"):
        complete_basis(random_orthonormal(20, 5, 0), 16)


def test_random_orthonormal_depends_on_the_seed_alone():
    first = random_orthonormal(50, 8, 3)
    torch.manual_seed(1)
    assert torch.equal(first, random_orthonormal(50, 8, 3))
    assert not torch.allclose(first, random_orthonormal(50, 8, 4))
    assert_orthonormal(first, 1e-13)


def test_random_orthonormal_spans_are_uniform():
    projections = torch.stack([random_orthonormal(6, 2, seed) for seed in range(3000)])
    mean = (projections @ projections.mT).mean(0)
    np.testing.assert_allclose(mean, np.eye(6) / 3, atol=0.03)
