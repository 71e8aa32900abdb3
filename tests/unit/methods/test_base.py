import math

import pytest
from pydantic import ValidationError

from lowrank_kit.errors import ConfigError
from lowrank_kit.methods.astra import Astra
from lowrank_kit.methods.lora import Lora
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
    with pytest.raises(ValidationError, match="train=down"):
        Lora(name="lora", train="down")
