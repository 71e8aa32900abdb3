import numpy as np
import pytest
import torch

from lowrank_kit.spectral.eliminate import DAMPING, Elimination, compensated, eliminate

TOKENS, OUT = 300, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(n):
    """Correlated channels of very different size [tokens, n], a weight and the root of a metric of its outputs."""
    x = draw(TOKENS, n) @ (torch.eye(n) + 0.3 * draw(n, n, seed=1) / n**0.5) * torch.logspace(-2, 2, n)
    return x, draw(OUT, n, seed=2), draw(OUT, OUT, seed=3)


def statistics(x, weight, root):
    return x.T @ x / len(x), weight.T @ root.T @ root @ weight


def refitted(x, weight, root, kept):
    """Least squares on the outputs themselves, in numpy: the weight of the kept channels, and what is lost.

    Damping is a token more for every channel, which only that channel sees.
    """
    tokens = np.vstack([x, np.diag(np.sqrt(DAMPING * (x.numpy() ** 2).sum(0)))])
    outputs = tokens @ weight.numpy().T
    found = np.linalg.lstsq(tokens[:, kept], outputs, rcond=None)[0] if kept else np.zeros((0, len(weight)))
    lost = (outputs - tokens[:, kept] @ found) @ root.numpy().T
    return found.T, (lost**2).sum() / len(x)


def test_every_channel_that_goes_is_the_cheapest_and_costs_what_least_squares_says():
    x, weight, root = case(12)
    found = eliminate(*statistics(x, weight, root))
    assert sorted(found.order.tolist()) == list(range(12))
    left, before = list(range(12)), 0.0
    for channel, loss in zip(found.order.tolist(), found.losses.tolist(), strict=True):
        costs = {j: refitted(x, weight, root, [i for i in left if i != j])[1] for j in left}
        assert channel == min(costs, key=costs.__getitem__)
        assert loss == pytest.approx(costs[channel] - before, rel=1e-6, abs=1e-9 * before)
        left.remove(channel)
        before = costs[channel]


def test_the_cost_is_that_of_the_set_over_several_products():
    x, weight, root = case(150)
    found = eliminate(*statistics(x, weight, root))
    for count in (1, 20, 86, 100, 149):
        expected = refitted(x, weight, root, found.kept(count))[1]
        assert float(found.losses[: 150 - count].sum()) == pytest.approx(expected, rel=1e-6)


def test_the_weight_of_those_that_stay_is_that_of_least_squares():
    x, weight, root = case(40)
    inputs, metric = statistics(x, weight, root)
    for kept in ([3], eliminate(inputs, metric).kept(25), list(range(40))):
        torch.testing.assert_close(
            compensated(weight, inputs, kept),
            torch.from_numpy(refitted(x, weight, root, kept)[0]),
            rtol=1e-6,
            atol=1e-8,
        )
    torch.testing.assert_close(compensated(weight, inputs, list(range(40))), weight)


def test_the_units_of_the_channels_play_no_part():
    x, weight, root = case(70)
    units = torch.logspace(-4, 4, 70)[torch.randperm(70, generator=torch.Generator().manual_seed(4))].double()
    found, scaled = (eliminate(*statistics(x * u, weight / u, root)) for u in (torch.ones(70), units))
    assert torch.equal(found.order, scaled.order)
    torch.testing.assert_close(found.losses, scaled.losses)


def test_silent_channels_go_first_for_nothing():
    x, weight, root = case(20)
    x[:, [3, 11]] = 0
    inputs, metric = statistics(x, weight, root)
    found = eliminate(inputs, metric)
    assert sorted(found.order[:2].tolist()) == [3, 11]
    assert found.losses[:2].tolist() == [0, 0]
    assert found.losses[2:].gt(0).all()
    torch.testing.assert_close(compensated(weight, inputs, [0, 3])[:, 1], weight[:, 3])


def test_one_of_two_equal_channels_goes_for_almost_nothing():
    _, weight, root = case(20)
    x = draw(TOKENS, 20)
    x[:, 7] = -3 * x[:, 12]
    inputs, metric = statistics(x, weight, root)
    found = eliminate(inputs, metric)
    assert int(found.order[0]) in (7, 12)
    assert float(found.losses[0]) < 1e-3 * float(found.losses[1])
    kept = found.kept(19)
    outputs, exact = x[:, kept] @ compensated(weight, inputs, kept).T, x @ weight.T
    assert (outputs - exact).norm() < 1e-4 * exact.norm()


def test_fewer_tokens_than_channels():
    """C is singular: as many channels as directions are missing go for almost nothing."""
    x, weight, root = case(90)
    inputs, metric = statistics(x[:50].clone(), weight, root)
    found = eliminate(inputs.float(), metric.float())
    assert found.losses.isfinite().all()
    assert found.losses.ge(0).all()
    assert float(found.losses[:40].sum()) < 1e-2 * float(found.losses.sum())
    kept = found.kept(50)
    outputs, exact = x[:50, kept] @ compensated(weight, inputs, kept).T, x[:50] @ weight.T
    assert (outputs - exact).norm() < 0.02 * exact.norm()


def test_kept_is_what_has_not_gone():
    found = Elimination(torch.tensor([2, 0, 3, 1]), torch.zeros(4, dtype=torch.float64))
    assert [found.kept(count) for count in (4, 2, 1)] == [[0, 1, 2, 3], [1, 3], [1]]
