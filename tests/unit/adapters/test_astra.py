from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.statistics import LayerStatistics
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef, layout_of
from lowrank_kit.spectral.moments import Moments

TOKENS, RANK = 400, 5


def layer(out_features, in_features, bias=False, tokens=TOKENS, seed=0):
    """A weight, a bias, inputs of uneven channels, and the outputs, all float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight = normal(out_features, in_features) / in_features**0.5
    offset = normal(out_features) if bias else None
    inputs = normal(tokens, in_features) * torch.logspace(1, -1, in_features, dtype=torch.float64) + 0.3
    outputs = inputs @ weight.T + (0 if offset is None else offset)
    return weight, offset, inputs, outputs


def statistics(side, rows, out_features, in_features, bias=False, name="block.linear"):
    ref = LinearRef(name, 0, "q", in_features, out_features, bias, "block:q")
    moments = Moments.zeros(rows.shape[1])
    moments.update(rows)
    return LayerStatistics(ref, side, moments)


def reduced(out_features, in_features, side="input", bias=False, tokens=TOKENS, name="block.linear", **settings):
    weight, offset, inputs, outputs = layer(out_features, in_features, bias, tokens)
    method = Astra(**{"name": "astra", "rank": RANK, **settings})
    rows = inputs if side == "input" else outputs
    kept = method.reduce(weight, offset, statistics(side, rows, out_features, in_features, bias, name))
    return method, weight, outputs, kept


SHAPES = [(24, 40), (40, 24), (32, 32)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features", "side"),
    [*((*shape, "input") for shape in SHAPES), (24, 40, "output"), (32, 32, "output")],
)
@pytest.mark.parametrize("subspace", ["top", "middle", "tail"])
def test_captured_energy_is_the_sum_of_the_chosen_eigenvalues(subspace, out_features, in_features, side, bias):
    method, weight, outputs, kept = reduced(out_features, in_features, side, bias, subspace=subspace)
    factors = method.initialise(weight, kept, RANK)
    q = factors.up
    assert torch.dist(q.T @ q, torch.eye(RANK, dtype=torch.float64)) < 1e-6
    assert torch.dist(factors.down, q.T @ weight) < 1e-12
    captured = (outputs @ q).square().sum()
    spectrum = np.linalg.svd(outputs.numpy(), compute_uv=False) ** 2
    rank = min(out_features, in_features + bias)
    start = {"top": 0, "middle": (rank - RANK) // 2, "tail": rank - RANK}[subspace]
    chosen = spectrum[start : start + RANK].sum()
    # Vectors are kept in float32: what leaks in from the largest direction bounds the tail.
    assert abs(captured - chosen) < 1e-6 * chosen + 1e-12 * spectrum[0]
    assert abs(kept["energy"].sum() - chosen) < 1e-6 * chosen + 1e-12 * spectrum[0]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("subspace", ["top", "middle", "tail"])
def test_on_the_input_side_they_are_the_inputs_own_directions(subspace, out_features, in_features):
    weight, _, inputs, _ = layer(out_features, in_features)
    method = Astra(name="astra", rank=RANK, side="input", subspace=subspace)
    assert method.needs().moments == "input"
    factors = method.initialise(
        weight, method.reduce(weight, None, statistics("input", inputs, out_features, in_features)), RANK
    )
    directions, _, _ = np.linalg.svd(inputs.numpy().T)
    start = {"top": 0, "middle": (in_features - RANK) // 2, "tail": in_features - RANK}[subspace]
    chosen = torch.from_numpy(directions[:, start : start + RANK])
    torch.testing.assert_close(factors.down.T @ factors.down, chosen @ chosen.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.up @ factors.down, weight @ chosen @ chosen.T, rtol=0, atol=1e-5)


def test_lora_null_is_silent_on_text_that_does_not_fill_the_inputs():
    weight, _, inputs, _ = layer(24, 40, tokens=20)
    method = Astra(name="lora_null", rank=RANK, side="input", null_space=True)
    factors = method.initialise(weight, method.reduce(weight, None, statistics("input", inputs, 24, 40)), RANK)
    assert (inputs @ factors.down.T).norm() < 1e-6 * inputs.norm()
    assert factors.up.norm(dim=0).min() > 0.1


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_tail_captures_least_and_top_most_of_all_frames_in_the_range(out_features, in_features):
    def captured(outputs, q):
        return float((outputs @ q).square().sum())

    energies = {}
    for subspace in ("top", "middle", "tail"):
        method, weight, outputs, kept = reduced(out_features, in_features, subspace=subspace)
        energies[subspace] = captured(outputs, method.initialise(weight, kept, RANK).up)
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        mixed = weight @ torch.randn(in_features, RANK, dtype=torch.float64, generator=generator)
        frame = torch.linalg.qr(mixed).Q
        assert energies["tail"] < captured(outputs, frame) < energies["top"]
    assert energies["tail"] < energies["middle"] < energies["top"]


def test_tail_stays_in_the_range_of_a_tall_weight_unless_the_null_space_is_allowed():
    method, weight, _, kept = reduced(40, 24)
    inside = method.initialise(weight, kept, RANK)
    assert inside.down.norm(dim=1).min() > 0.1
    projector = weight @ torch.linalg.pinv(weight)
    assert torch.dist(projector @ inside.up, inside.up) < 1e-5
    method, weight, outputs, kept = reduced(40, 24, null_space=True)
    outside = method.initialise(weight, kept, RANK)
    assert torch.dist(outside.up.T @ outside.up, torch.eye(RANK, dtype=torch.float64)) < 1e-6
    assert outside.down.norm() < 1e-5
    assert (outputs @ outside.up).norm() < 1e-5 * outputs.norm()


def test_the_null_space_is_taken_only_as_far_as_it_goes():
    method, weight, _, kept = reduced(26, 24, null_space=True)
    norms = method.initialise(weight, kept, RANK).down.norm(dim=1)
    assert int((norms < 1e-5).sum()) == 2


@pytest.mark.parametrize(("side", "shape"), [("input", (40, 24)), ("output", (24, 40))])
def test_fewer_tokens_than_the_rank_are_a_clear_error(side, shape):
    with pytest.raises(LowRankKitError, match=r"block\.linear span only 4 directions.*rank 5.*calibration\.samples"):
        reduced(*shape, side=side, tokens=4)
    method, weight, _, kept = reduced(*shape, side=side, tokens=4, null_space=True)
    assert method.initialise(weight, kept, RANK).up.shape == (shape[0], RANK)


def test_random_directions_depend_on_seed_and_layer_and_nothing_else():
    def basis(**settings):
        return reduced(24, 40, subspace="random", **settings)[3]["basis"]

    assert torch.equal(basis(), basis())
    assert torch.equal(basis(tokens=300), basis())
    assert not torch.allclose(basis(seed=1), basis())
    assert not torch.allclose(basis(name="block.other"), basis())


@pytest.mark.parametrize("subspace", ["top", "middle", "tail"])
def test_a_smaller_rank_takes_the_most_wanted_directions(subspace):
    _, _, _, few = reduced(24, 40, subspace=subspace, rank=4)
    method, weight, _, many = reduced(24, 40, subspace=subspace, rank=4, allocation="effective_rank")
    assert many["basis"].shape == (24, 8)
    first, second = method.initialise(weight, many, 4).up, few["basis"].double()
    assert torch.dist(first @ first.T, second @ second.T) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_allocation_spends_the_same_budget_by_log_effective_rank(tiny_model, family):
    layout = layout_of(tiny_model(family, "classification"))
    method = Astra(name="astra", rank=6, allocation="effective_rank")
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for ref in layout.linears:
        decay = 3 * torch.rand(1, generator=generator).item()
        spectrum = torch.arange(1, min(ref.in_features, ref.out_features) + 1, dtype=torch.float64) ** -decay
        kept[ref.name] = {"spectrum": spectrum, "basis": torch.zeros(ref.out_features, 12)}
    plan = method.plan(layout, kept)
    cost = {ref.name: ref.in_features + ref.out_features for ref in layout.linears}
    spent, budget = sum(plan.ranks[n] * c for n, c in cost.items()), 6 * sum(cost.values())
    assert budget - min(cost.values()) < spent <= budget
    assert min(plan.ranks.values()) >= 1
    assert max(plan.ranks.values()) <= 12
    by_score = sorted(plan.ranks, key=plan.scores.get)
    ranks = [plan.ranks[name] for name in by_score]
    assert all(later >= earlier - 1 for earlier, later in pairwise(ranks))
    assert ranks[-1] > ranks[0]
    # The released code's log(R + 1), R the exponential of the entropy.
    shares = {n: np.log(np.exp(spectrum_entropy(kept[n]["spectrum"])) + 1) for n in cost}
    assert all(abs(plan.scores[n] - shares[n]) < 1e-9 for n in cost)


def spectrum_entropy(spectrum):
    p = spectrum.numpy() / spectrum.sum().item()
    return float(-(p * np.log(p)).sum())


def test_only_settings_that_change_the_kept_tensors_are_in_the_key():
    method = Astra(name="astra")
    same = method.model_copy(update={"alpha": 3.0, "base": "untouched", "train": "up", "seed": 5, "dropout": 0.1})
    assert method.reduction_key() == same.reduction_key()
    random = [Astra(name="astra", subspace="random", seed=seed).reduction_key() for seed in (0, 1)]
    assert random[0] != random[1]
