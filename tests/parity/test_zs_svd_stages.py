"""Zero-Sum SVD in stages, against a form of its own in float64."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.allocations.zs_svd import ZeroSum
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.zs_svd import ZeroSumSVD
from lowrank_kit.corrections.residual import Residual
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.truncations.joint import Joint
from lowrank_kit.truncations.optimal import Optimal


def settings(**given):
    usual = {"name": "x", "ratio": 0.4, "rank_multiple": 1, "truncation": Optimal(), "allocation": Uniform()}
    return ZeroSumSVD(**usual | given)


def test_stages_truncate_and_pull_back_along_the_gradient(model, rows, work, seen, cut, replaced, same_model):
    """Arxiv 2602.02848; pull_subspace with one window: W' + <G, W - W'> / (<G, G> + 1e-6) G between truncations."""
    stages, tokens = 3, 24
    plan, compressed = work(model, settings(stages=stages, pull_tokens=tokens))
    original = {name: layer.weight for name, layer in seen(model).items()}
    order, current = torch.Generator().manual_seed(0), model
    for stage in range(stages):
        weights = {}
        for name, layer in seen(current).items():
            s = np.linalg.cholesky(layer.x.T @ layer.x)
            weights[name] = cut(layer.weight @ s, plan.ranks[name]) @ np.linalg.inv(s)
        if stage < stages - 1:
            window = rows[torch.randint(len(rows), (1,), generator=order), -tokens:]
            free = replaced(model, weights).double()
            logits = free(input_ids=window).logits[0]
            cross_entropy(logits[:-1], window[0, 1:]).backward()
            for name, weight in weights.items():
                gradient = free.get_submodule(name).weight.grad.numpy()
                along = (gradient * (original[name] - weight)).sum() / ((gradient**2).sum() + 1e-6)
                weights[name] = weight + along * gradient
        current = replaced(model, weights)
    same_model(compressed, model, weights)
    # It is not what one stage gives.
    with pytest.raises(AssertionError):
        same_model(work(model, settings())[1], model, weights)


def test_what_is_left_dense_has_its_original_weight(model, work):
    plan, compressed = work(model, settings(stages=2, ratio=0.2, allocation=ZeroSum(), dense=True))
    dense = [name for name, rank in plan.ranks.items() if rank == min(model.get_submodule(name).weight.shape)]
    assert dense
    for name in dense:
        assert torch.equal(compressed.get_submodule(name).weight, model.get_submodule(name).weight), name


def test_a_later_process_goes_through_the_same_stages(model, rows, tmp_path):
    """It finds the statistics of each in the cache, and ends at the same factors."""
    samples, found = CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=3), []
    for _ in range(2):
        copy = deepcopy(model)
        context = Context(copy, layout_of(copy), samples, cache=tmp_path)
        compression = Compression(settings(stages=3), context)
        found.append(compression.apply(compression.plan()).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"correction": Residual()}, r"method\.correction=residual"),
        ({"truncation": Joint()}, "joins blocks"),
    ],
)
def test_what_stages_do_not_go_with_is_refused(model, given, words):
    settings(**given).check(layout_of(model))
    with pytest.raises(ConfigError, match=words):
        settings(stages=2, **given).check(layout_of(model))
    with pytest.raises(ConfigError, match=r"runtime\.weights=streamed"):
        settings(stages=2).check_streamed()
