"""Adapters on a compressed model: they stand at the halves of its factored linears."""

from copy import deepcopy

import pytest
import torch

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.corda import Corda
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.eva import Eva
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.lora_ga import LoraGA
from lowrank_kit.adapters.pissa import Pissa
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.factored import share_down
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.training.initialise import adapt

FACTORED_ROLES, RANK = ("q", "v", "down"), 10


def token_ids():
    return torch.randint(3, 64, (8, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compressed(tiny_model):
    model = tiny_model("llama")
    for ref in layout_of(model).linears:
        if ref.role in FACTORED_ROLES:
            u, s, vh = torch.linalg.svd(weight_of(model.get_submodule(ref.name)).detach(), full_matrices=False)
            storage = Factors() if ref.role == "v" else Pivot()
            storage.put(model, [ref.name], LowRankFactors(u[:, :RANK] * s[:RANK], vh[:RANK]))
    return model


def samples():
    return CalibrationSamples(tuple({"input_ids": row} for row in token_ids()), batch_size=4)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize(
    "method",
    [
        Lora(name="lora", rank=4),
        Dora(name="dora", rank=4),
        Astra(name="astra", rank=4),
        Astra(name="astra", rank=4, base="untouched", subspace="top"),
        Pissa(name="pissa", rank=4),
        Corda(name="corda", rank=4),
        Eva(name="eva", rank=4),
        LoraGA(name="lora_ga", rank=4),
    ],
    ids=lambda method: f"{method.name}-{getattr(method, 'base', '')}",
)
def test_the_halves_carry_the_adapter_which_starts_as_the_model(compressed, method):
    ready = adapt(deepcopy(compressed), method, samples())
    expected = logits(compressed)
    assert (logits(ready.model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if method.name != "eva":
        stems = {f"{ref.name}{half}" for ref in layout_of(compressed).linears
                 for half in ((".down", ".up") if ref.role in FACTORED_ROLES else ("",))}  # fmt: skip
        assert ready.plan.ranks.keys() == stems
        assert set(ready.plan.ranks.values()) == {4}
    assert ready.trained_parameters == ready.plan.trained_parameters
    weights = sum(p.numel() for name, p in compressed.named_parameters() if "layers" in name and "norm" not in name)
    assert ready.plan.parameters_before == weights


def test_astra_at_the_down_half_starts_in_the_space_between_the_halves(compressed):
    method, states = Astra(name="astra", rank=3, subspace="top", roles=("down",)), []
    name = "model.layers.1.mlp.down_proj.down"
    handle = compressed.get_submodule(name).register_forward_hook(lambda *call: states.append(call[2].flatten(0, 1)))
    logits(compressed)
    handle.remove()
    ready = adapt(compressed, method, samples())
    _, vectors = torch.linalg.eigh(states[0].double().T @ states[0].double())
    overlap = torch.linalg.svdvals(vectors[:, -3:].T @ ready.factors(name).up)
    assert overlap.min() > 1 - 1e-6


def test_a_shared_factor_cannot_give_up_two_starts(compressed):
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    share_down(compressed, second, first)
    for method in (Astra(name="astra", rank=4), Pissa(name="pissa", rank=4)):
        with pytest.raises(LowRankKitError, match=f"{first}.down and {second}.down share one weight"):
            adapt(deepcopy(compressed), method, samples())
    ready = adapt(deepcopy(compressed), Astra(name="astra", rank=4, base="untouched"), samples())
    assert torch.allclose(logits(ready.model), logits(compressed), atol=1e-5)
    up_only = Astra(name="astra", rank=4, roles=("k", "o"))
    assert torch.allclose(logits(adapt(deepcopy(compressed), up_only, samples()).model), logits(compressed), atol=1e-5)


def test_a_rank_above_that_of_the_factors_is_refused(compressed):
    with pytest.raises(ConfigError, match=r"q_proj\.down .* 1 to 10"):
        Lora(name="lora", rank=11).check(layout_of(compressed))
