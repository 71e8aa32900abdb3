import numpy as np
import pytest
import torch

from lowrank_kit.spectral.moments import ROWS_PER_PRODUCT, Moments


def activations(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x, mask=None):
    moments = Moments.zeros(x.shape[-1])
    moments.update(x, mask)
    return moments


def assert_close(a, b, rtol):
    np.testing.assert_allclose(a.gram, b.gram, rtol=rtol, atol=rtol * float(b.gram.abs().max()))
    np.testing.assert_allclose(a.total, b.total, rtol=rtol, atol=rtol * float(b.gram.abs().max()))
    assert a.count == b.count


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7)])
def test_sums_match_numpy_in_float64(shape):
    x = activations(*shape)
    rows = x.double().reshape(-1, 7).numpy()
    moments = moments_of(x)
    np.testing.assert_allclose(moments.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.total, rows.sum(0), rtol=1e-12)
    assert moments.count == len(rows)


def test_float64_input_is_summed_in_float64():
    x = activations(50, 7).double()
    np.testing.assert_allclose(moments_of(x).gram, x.numpy().T @ x.numpy(), rtol=1e-13, atol=1e-13)


def test_many_rows_keep_float32_rounding_short():
    x = activations(32 * ROWS_PER_PRODUCT + 5, 64) + 100
    exact = x.double().T @ x.double()
    np.testing.assert_allclose(moments_of(x).gram, exact, rtol=2e-7)
    assert ((x.T @ x) / exact - 1).abs().max() > 2e-7


def test_bfloat16_products_are_those_of_its_float32_cast():
    x = activations(6, 9, 7).bfloat16()
    assert_close(moments_of(x), moments_of(x.double()), 1e-6)


def test_autocast_does_not_lower_the_products():
    x = activations(64, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = moments_of(x)
    assert torch.equal(inside.gram, moments_of(x).gram)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
def test_padding_on_either_side_changes_nothing(side, dtype):
    texts = [activations(length, 7, seed=length) for length in (3, 8, 1)]
    padded, mask = torch.full((3, 8, 7), float("nan")), torch.zeros(3, 8, dtype=dtype)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(8 - len(text), 8)
        padded[row, where], mask[row, where] = text, 1
    assert_close(moments_of(padded, mask), moments_of(torch.cat(texts)), 1e-6)


def test_empty_mask_adds_nothing():
    moments = moments_of(activations(2, 3, 7), torch.zeros(2, 3, dtype=torch.bool))
    assert moments.count == 0
    assert not moments.gram.any()


def test_batches_add_up_to_one_pass():
    parts = [activations(n, 7, seed=n) for n in (1, 20, 300)]
    moments = moments_of(parts[0])
    for part in parts[1:]:
        moments.update(part)
    assert_close(moments, moments_of(torch.cat(parts)), 1e-6)


def test_augmented_is_the_gram_with_a_one_appended():
    x = activations(40, 7).double()
    with_one = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1).numpy()
    np.testing.assert_allclose(moments_of(x).augmented(), with_one.T @ with_one, rtol=1e-12, atol=1e-12)


def test_without_bias_are_the_moments_of_the_shifted_outputs():
    y, bias = activations(40, 7).double(), activations(7, seed=1)
    assert_close(moments_of(y).without_bias(bias), moments_of(y - bias.double()), 1e-12)


def test_non_contiguous_and_differentiable_activations():
    x = activations(7, 5, 6).requires_grad_()
    moments = moments_of(x.permute(2, 1, 0), torch.ones(6, 5, dtype=torch.bool))
    assert_close(moments, moments_of(x.detach().permute(2, 1, 0).contiguous()), 1e-6)
    assert not moments.gram.requires_grad


def test_non_finite_values_are_counted_and_leave_the_sums_alone():
    x = activations(2 * ROWS_PER_PRODUCT, 7)
    x[-1, 2], x[-2, 3] = float("nan"), float("-inf")
    moments = Moments.zeros(7)
    with pytest.raises(ValueError, match=r"^2 of \d+ activations are not finite"):
        moments.update(x)
    assert moments.count == 0
    assert not moments.gram.any()


def test_wrong_width_is_refused_even_where_the_elements_would_fit():
    with pytest.raises(ValueError, match="width 14 for moments of width 7"):
        Moments.zeros(7).update(activations(3, 14))
