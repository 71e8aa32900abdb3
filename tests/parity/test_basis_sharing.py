"""Basis Sharing (arXiv 2410.03765): weights of neighbouring blocks side by side, one scaled SVD."""

import numpy as np
import pytest

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.joint import Joint

SHARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", initializer_range=0.2, num_hidden_layers=4)


def test_two_blocks_are_written_in_one_basis_as_in_the_paper(model, work, seen, cut, same_model):
    """Section 3.2: with S S^T the pooled second moment, SVD of `S^T [W_1 ... W_n]`, W [in, out], cut and unscaled."""
    settings = {"name": "x", "ratio": 0.4, "rank_multiple": 1, "allocation": Uniform(), "truncation": Joint(blocks=2)}
    plan, compressed = work(model, TruncatedSVD(**settings))
    layers, expected = seen(model), {}
    for name, layer in layers.items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        group = [name]
        if rest.endswith(SHARED):
            group = [f"model.layers.{b}.{rest}" for b in (int(block) // 2 * 2, int(block) // 2 * 2 + 1)]
        x = np.concatenate([layers[member].x for member in group])
        s = np.linalg.cholesky(x.T @ x)
        beside = np.concatenate([layers[member].weight.T for member in group], axis=1)  # [in, n out]
        together = np.linalg.inv(s.T) @ cut(s.T @ beside, plan.ranks[name])
        width = layer.weight.shape[0]
        expected[name] = together[:, group.index(name) * width :][:, :width].T
        rows, columns = beside.shape
        assert abs(plan.ranks[name] - 0.6 * rows * columns / (rows + columns)) <= 1
    one = "model.layers.3.self_attn.q_proj"
    found = compressed.get_submodule(one).dense_weight().detach().double().numpy()
    assert np.linalg.norm(found - expected[one]) <= 1e-3 * np.linalg.norm(expected[one])
    same_model(compressed, model, expected)
    # The basis is stored once, and counted once.
    first, second = (compressed.model.layers[b].self_attn.q_proj.down.weight for b in (2, 3))
    assert first is second
    left = sum(p.numel() for n, p in compressed.named_parameters() if "proj" in n)
    assert left == plan.parameters_after <= 0.6 * plan.parameters_before
