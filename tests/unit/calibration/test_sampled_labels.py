"""Labels sampled from the model: their gradients' second moment is the Gauss-Newton matrix, whatever the batches."""

import pytest
import torch

from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.zs_svd import ZeroSum
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.statistics import GradientRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.truncations.two_sided import TwoSided

NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", initializer_range=0.3).double()


def rows(count, tokens=7):
    return torch.randint(3, 64, (count, tokens), generator=torch.Generator().manual_seed(0))


def collected(model, ids, seed, batch_size=4):
    samples = CalibrationSamples(tuple({"input_ids": row} for row in ids))
    layout = layout_of(model)
    refs = [ref for ref in layout.linears if ref.name in NAMES]
    request, found = GradientRequest(moments=True, diagonal=True, label_seed=seed), {}
    for _, statistics in stream_gradients(model, layout, samples.batches(batch_size, 0), refs, request):
        found |= statistics
    return found


def gauss_newton(model, ids, name):
    """Sum over positions t and later predictions s of J_st^T (diag p_s - p_s p_s^T) J_st, per predicted token."""
    module, total = model.get_submodule(name), 0
    out = module.weight.shape[0]
    for row in ids:

        def logits(delta, row=row):
            handle = module.register_forward_hook(lambda _m, _x, output: output + delta)
            found = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            handle.remove()
            return found

        zero = torch.zeros(len(row), out, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(logits, zero)
        p = logits(zero).detach().softmax(-1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        total = total + torch.einsum("sato,sab,sbtu->ou", jacobian, curvature, jacobian)
    return total / (len(ids) * (ids.shape[1] - 1))


def test_they_average_to_the_gauss_newton_matrix(model):
    ids, draws = rows(4), 100
    found = dict.fromkeys(NAMES, 0)
    for seed in range(draws):
        for name, statistics in collected(model, ids, seed).items():
            found[name] = found[name] + statistics.gram / draws
            assert float(statistics.diagonal.sum()) == pytest.approx(statistics.energy, rel=1e-9)
    true = collected(model, ids, None)
    for name in NAMES:
        expected = gauss_newton(model, ids, name)
        assert float(found[name].trace()) == pytest.approx(float(expected.trace()), rel=0.1)
        assert (found[name] - expected).norm() < 0.15 * expected.norm()
        # The text's labels are another matrix: here, where the model knows nothing of them, a larger one.
        assert (true[name].gram - expected).norm() > 0.3 * expected.norm()


def test_the_draws_are_the_rows_and_the_seeds(model):
    ids = rows(5)
    for size in (1, 3):
        for name, statistics in collected(model, ids, 0, size).items():
            torch.testing.assert_close(statistics.gram, collected(model, ids, 0)[name].gram, rtol=1e-5, atol=0)
    assert not torch.allclose(collected(model, ids, 1)[NAMES[0]].gram, collected(model, ids, 0)[NAMES[0]].gram)


def test_a_rule_that_reads_the_texts_labels_is_refused(model):
    settings = {"name": "any", "ratio": 0.4, "truncation": TwoSided(label_seed=0)}
    with pytest.raises(ConfigError, match=r"leave method\.truncation\.label_seed out"):
        TruncatedSVD(**settings, allocation=ZeroSum()).check(layout_of(model))
    TruncatedSVD(**settings, allocation=Lagrangian()).check(layout_of(model))
