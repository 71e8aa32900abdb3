import numpy as np
import pytest
import scipy.stats
import torch

from lowrank_kit.spectral.metrics import (
    decay_exponent,
    effective_rank,
    head_concentration,
    rank_density,
    tail_energy,
    tail_participation,
    tail_redundancy,
)

SPECTRUM = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
METRICS = [
    effective_rank,
    lambda s: rank_density(s, 4, 4),
    lambda s: tail_energy(s, 1),
    lambda s: head_concentration(s, 1, 0.9),
    lambda s: tail_redundancy(s, 1, 0.9),
    lambda s: tail_participation(s, 1),
    decay_exponent,
]


def test_effective_rank_is_the_exponential_of_scipys_entropy():
    np.testing.assert_allclose(effective_rank(SPECTRUM), np.exp(scipy.stats.entropy(SPECTRUM)), rtol=1e-12)
    assert rank_density(SPECTRUM, 100, 50) == effective_rank(SPECTRUM) / 50


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_flat_spectra_have_the_rank_they_have(rank):
    spectrum = torch.cat([torch.full((rank,), 0.7), torch.zeros(8 - rank)])
    assert effective_rank(spectrum) == pytest.approx(rank)


def test_tail_energy_runs_from_one_to_zero():
    energies = [tail_energy(SPECTRUM, k) for k in range(51)]
    assert energies[0] == 1
    assert energies[-1] == 0
    steps = -np.diff(energies) * float(SPECTRUM.sum())
    np.testing.assert_allclose(steps, np.sort(SPECTRUM)[::-1], rtol=1e-9)


@pytest.mark.parametrize(
    ("k0", "eta", "expected"), [(4, 1.0, 0.0), (4, 0.5, 0.5), (4, 0.51, 0.25), (8, 1.0, 0.5), (1, 0.1, 0.0)]
)
def test_head_concentration_counts_the_kept_components_that_eta_spares(k0, eta, expected):
    assert head_concentration(torch.tensor([1.0] * 4 + [0.0] * 4), k0, eta) == expected


@pytest.mark.parametrize(
    ("tail", "eta", "expected"),
    [
        ([1, 1, 1, 1], 0.5, 1 / 2),
        ([6, 2, 1, 1], 0.6, 3 / 4),
        ([6, 2, 1, 1], 0.61, 1 / 2),
        ([6, 2, 1, 1], 1.0, 0.0),
        ([3, 0, 0, 0, 0], 1.0, 4 / 5),
        ([0, 0], 0.9, 1.0),
        ([], 0.9, 1.0),
    ],
)
@pytest.mark.parametrize("head", [[], [9, 7], [100, 50, 20]])
def test_tail_redundancy_speaks_of_what_lies_beyond_the_rank_alone(head, tail, eta, expected):
    spectrum = torch.tensor([*head, *tail], dtype=torch.float64)
    assert tail_redundancy(spectrum, len(head), eta) == pytest.approx(expected)


def test_tail_participation_is_the_length_of_a_flat_tail_that_is_as_spread():
    assert tail_participation(torch.tensor([9.0, 2, 2, 2, 2]), 1) == 1
    assert tail_participation(torch.tensor([9.0, 2, 0, 0, 0]), 1) == 1 / 4
    # (3 + 1)^2 / (4 (9 + 1)) = 16 / 40
    assert tail_participation(torch.tensor([9.0, 3, 1, 0, 0]), 1) == pytest.approx(0.4)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("start", [0, 10])
def test_decay_exponent_recovers_a_power_law(exponent, start):
    j = torch.arange(1, 101, dtype=torch.float64)
    spectrum = torch.cat([j**-exponent, torch.zeros(7)])
    assert decay_exponent(spectrum, start) == pytest.approx(-exponent, abs=1e-10)


def test_decay_exponent_is_scipys_regression():
    ordered = np.sort(SPECTRUM)[::-1][20:]
    slope = scipy.stats.linregress(np.log(np.arange(21, 51)), np.log(ordered)).slope
    assert decay_exponent(SPECTRUM, 20) == pytest.approx(slope)


def test_decay_exponent_needs_two_values():
    with pytest.raises(ValueError, match="after index 2, found 1"):
        decay_exponent(torch.tensor([3.0, 2.0, 1.0, 0.0]), 2)


def test_all_zero_spectra_are_defined():
    zeros = torch.zeros(4)
    assert [metric(zeros) for metric in METRICS[:-1]] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_negative_and_non_finite_values_are_refused(metric, bad):
    with pytest.raises(ValueError, match="1 of 4 spectrum values"):
        metric(torch.tensor([1.0, 1.0, 1.0, bad]))


def test_order_and_scale_do_not_matter():
    shuffled = SPECTRUM[torch.randperm(50, generator=torch.Generator().manual_seed(1))] * 1e9
    for metric in METRICS:
        assert metric(shuffled) == pytest.approx(metric(SPECTRUM), rel=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tail_energy(SPECTRUM, 51),
        lambda: head_concentration(SPECTRUM, 0, 0.9),
        lambda: tail_redundancy(SPECTRUM, 51, 0.9),
        lambda: tail_participation(SPECTRUM, 51),
    ],
)
def test_indices_outside_the_spectrum_name_the_legal_range(call):
    with pytest.raises(ValueError, match=r"must be in \d\.\.50"):
        call()


@pytest.mark.parametrize("eta", [0.0, 1.1])
def test_eta_is_a_share(eta):
    with pytest.raises(ValueError, match="eta must be in"):
        tail_redundancy(SPECTRUM, 5, eta)
