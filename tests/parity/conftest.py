"""A tiny Llama, its calibration rows, and what an observer sees of them: numpy in float64, nothing of the package."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.models.layout import layout_of

ROWS, TOKENS = 8, 40


@dataclass
class Seen:
    """A linear: its weight [out, in], and of every row its inputs [tokens, in] and the gradients at its outputs.

    The loss of a row is the SUM of its predicted tokens' losses.
    """

    weight: np.ndarray
    inputs: list[np.ndarray] = field(default_factory=list)
    gradients: list[np.ndarray] = field(default_factory=list)

    @property
    def x(self):
        return np.concatenate(self.inputs)

    @property
    def mean_gradient(self):
        """Of the mean loss over all predicted tokens, in the weight."""
        rows = zip(self.gradients, self.inputs, strict=True)
        return sum(g.T @ x for g, x in rows) / (len(self.inputs) * (len(self.inputs[0]) - 1))


@pytest.fixture
def model(tiny_model):
    """Weights large enough for the blocks to matter."""
    return tiny_model("llama", initializer_range=0.2)


@pytest.fixture
def rows():
    return torch.randint(3, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def probe_rows():
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def work(rows) -> Callable:
    """The package at work: `work(model, method)` gives the plan and the compressed copy of the model."""

    def compress(model, method, probe_windows=None):
        copy = deepcopy(model)
        samples = CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=3)
        bench = Context(copy, layout_of(copy), samples, probe_windows=probe_windows)
        compression = Compression(method, bench)
        compression.calibrate()
        plan = compression.plan()
        return plan, compression.apply(plan).eval()

    return compress


@pytest.fixture
def seen(rows) -> Callable[..., dict[str, Seen]]:
    """Look at every linear of the blocks, one row at a time, in float64."""

    def look(model):
        model = deepcopy(model).double()
        found = {}
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                layer = found[f"model.layers.{name}"] = Seen(module.weight.detach().numpy())
                module.register_forward_pre_hook(
                    lambda _m, x, layer=layer: layer.inputs.append(x[0][0].detach().numpy())
                )
                module.register_full_backward_hook(
                    lambda _m, _x, g, layer=layer: layer.gradients.append(g[0][0].numpy())
                )
        for row in rows:
            logits = model(input_ids=row[None]).logits[0]
            cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        return found

    return look


@pytest.fixture
def loss(probe_rows) -> Callable[[torch.nn.Module], float]:
    """Mean loss of a predicted token on the probe's rows."""

    @torch.no_grad()
    def measure(model):
        logits = model(input_ids=probe_rows).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), probe_rows[:, 1:].flatten()))

    return measure


def with_weights(model, weights):
    """A copy of the model in which these linears have these weights."""
    copy = deepcopy(model)
    for name, weight in weights.items():
        copy.get_submodule(name).weight.data = torch.as_tensor(weight, dtype=torch.float32)
    return copy


@pytest.fixture
def same_model(rows) -> Callable:
    """Assert that the compressed model computes what the original with these dense weights does."""

    @torch.no_grad()
    def check(compressed, model, weights):
        expected = with_weights(model, weights)(input_ids=rows).logits
        found = compressed(input_ids=rows).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))

    return check


def truncated(matrix, rank):
    """The best approximation of this rank in the Frobenius norm."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.fixture
def cut() -> Callable[[np.ndarray, int], np.ndarray]:
    return truncated


@pytest.fixture
def replaced() -> Callable:
    return with_weights
