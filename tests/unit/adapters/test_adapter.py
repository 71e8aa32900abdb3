import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.mica import Mica
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of


@pytest.fixture(scope="module")
def layout(tiny_model):
    return layout_of(tiny_model("llama"))


def test_ranks_follow_the_pattern_by_role_and_by_path(layout):
    method = Lora(name="lora", rank=8, rank_pattern={"q": 3, r".*\.layers\.2\.mlp\..*": 5})
    plan = method.plan(layout, {})
    by_hand = {ref.name: 3 if ref.role == "q" else 5 if ".layers.2.mlp." in ref.name else 8 for ref in layout.linears}
    assert plan.ranks == by_hand
    dense = sum(ref.in_features * ref.out_features for ref in layout.linears)
    added = sum(by_hand[ref.name] * (ref.in_features + ref.out_features) for ref in layout.linears)
    assert (plan.parameters_before, plan.parameters_after) == (dense, dense + added)
    assert plan.kept_blocks == (0, 1, 2)


def test_only_the_chosen_roles_are_adapted(layout):
    plan = Lora(name="lora", rank=2, roles=("v", "down")).plan(layout, {})
    assert {name.rpartition(".")[2] for name in plan.ranks} == {"v_proj", "down_proj"}


@pytest.mark.parametrize(
    "wanted",
    [("q_proj", "down_proj"), r"model\.layers\.[02]\..*_proj", "all-linear", ("layers.1.mlp.up_proj", "v_proj")],
)
def test_target_modules_are_those_that_peft_would_take(tiny_model, layout, wanted):
    taken = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=list(wanted) if isinstance(wanted, tuple) else wanted)
    )
    expected = {name.removeprefix("base_model.model.") for name, m in taken.named_modules() if hasattr(m, "lora_A")}
    assert {ref.name for ref in Lora(name="lora", target_modules=wanted).targets(layout)} == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("q_proj", "vproj"), r"'vproj' matches no linear in the blocks of this llama; did you mean 'v_proj'"),
        (("proj",), r"'proj' matches no linear"),
        (("lm_head",), r"'lm_head' matches no linear .*end in q_proj, k_proj"),
        ((), "names no linear"),
    ],
)
def test_target_modules_that_match_nothing_are_named(layout, wanted, message):
    with pytest.raises(ConfigError, match=message):
        Lora(name="lora", target_modules=wanted).check(layout)


@pytest.mark.parametrize("settings", [{"target_modules": "(q"}, {"target_modules": ("q_proj",), "roles": ("q",)}])
def test_target_modules_that_cannot_be_right_are_refused_by_the_schema(settings):
    with pytest.raises(ValidationError, match="target_modules"):
        Lora(name="lora", **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 1.0), ({"alpha": 4.0}, 0.25), ({"rslora": True}, 4.0), ({"alpha": 4.0, "rslora": True}, 1.0)],
)
def test_scaling(settings, expected):
    assert math.isclose(Lora(name="lora", **settings).scaling(16), expected)


def test_a_rank_above_a_matrix_names_the_matrix_and_the_largest_legal_rank(layout):
    with pytest.raises(ConfigError, match=r"k_proj.*1 to 24"):
        Lora(name="lora", rank=25).check(layout)
    Lora(name="lora", rank=24).check(layout)
    with pytest.raises(ConfigError, match=r"q_proj.*1 to 32"):
        Lora(name="lora", rank=24, rank_pattern={"q": 33}).check(layout)


def test_a_pattern_that_matches_nothing_names_the_nearest_role(layout):
    with pytest.raises(ConfigError, match=r"'gat'.*did you mean 'gate'"):
        Lora(name="lora", rank_pattern={"gat": 2}).check(layout)


def test_a_role_that_the_model_lacks_is_named(layout):
    with pytest.raises(ConfigError, match="qkv"):
        Lora(name="lora", roles=("qkv",)).check(layout)


@pytest.mark.parametrize("pattern", [{"(q": 2}, {"q": 0}, {"q": -1}])
def test_a_pattern_that_cannot_be_right_is_refused_by_the_schema(pattern):
    with pytest.raises(ValidationError, match="rank_pattern"):
        Astra(name="astra", rank_pattern=pattern)


def test_lora_whose_zero_factor_is_frozen_is_refused():
    with pytest.raises(ValidationError, match="train"):
        Lora(name="lora", train="down")


def trained(kind, layout, **settings):
    method = kind(name="test", **settings)
    plan = method.plan(layout, {})
    [rank] = set(plan.ranks.values())
    return rank, plan.trained_parameters


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Lora, {}),
        (Lora, {"train": "up"}),
        (Dora, {"roles": ("q", "v", "up")}),
        (Mica, {}),
        (Astra, {"train": "down"}),
        (Astra, {"train": "both", "roles": ("down",)}),
    ],
)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_matched_rank_is_the_largest_that_stays_within_the_parameters(layout, kind, settings, rank):
    _, exact = trained(kind, layout, rank=rank, **settings)
    _, next_one = trained(kind, layout, rank=rank + 1, **settings)
    for wanted in (exact, exact + 1, next_one - 1):
        assert trained(kind, layout, match_parameters=wanted, **settings) == (rank, exact)
    method = kind(name="test", match_parameters=exact - 1, **settings)
    if rank == 1:
        with pytest.raises(ConfigError, match=rf"match_parameters={exact - 1}: .* {exact} already"):
            method.check(layout)
    else:
        assert set(method.plan(layout, {}).ranks.values()) == {rank - 1}


def test_a_matched_rank_stops_at_the_smallest_matrix(layout):
    rank, _ = trained(Lora, layout, match_parameters=10**9)
    assert rank == min(min(ref.in_features, ref.out_features) for ref in layout.linears)


def test_trained_parameters_count_what_learns(layout):
    shapes = [(ref.out_features, ref.in_features) for ref in layout.linears]
    counts = {
        Lora: sum(4 * (o + i) for o, i in shapes),
        Dora: sum(4 * (o + i) + o for o, i in shapes),
        Mica: sum(4 * i for _, i in shapes),
    }
    assert {kind: trained(kind, layout, rank=4)[1] for kind in counts} == counts


def test_an_allocation_of_astra_stays_within_the_matched_parameters(layout):
    kept = {ref.name: {"spectrum": torch.rand(24) ** (2 * i)} for i, ref in enumerate(layout.linears)}
    kept = {name: {**found, "basis": torch.zeros(32, 12)} for name, found in kept.items()}
    for train in ("both", "down"):
        method = Astra(name="astra", match_parameters=9000, train=train, allocation="effective_rank")
        even = Astra(name="astra", match_parameters=9000, train=train).plan(layout, {})
        plan = method.plan(layout, kept)
        assert len(set(plan.ranks.values())) > 1
        assert 0.97 * even.trained_parameters <= plan.trained_parameters <= even.trained_parameters <= 9000


def test_a_matched_rank_and_a_pattern_exclude_each_other():
    with pytest.raises(ValidationError, match="leave rank_pattern empty"):
        Lora(name="lora", match_parameters=1000, rank_pattern={"q": 2})
    assert "match_parameters" not in Lora(name="lora").model_dump()
