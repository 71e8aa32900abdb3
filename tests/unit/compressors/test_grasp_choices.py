import pytest
import torch
from pydantic import ValidationError

from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.truncations.joint import Joint

ROOMY = {"num_hidden_layers": 10, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}


@pytest.fixture
def layout(tiny_model):
    """Ten blocks, wide enough for a tenth of a matrix to be a rank."""
    return layout_of(tiny_model("llama", **ROOMY))


def grasp(**settings):
    return Grasp(name="grasp", **settings)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.37, 0.5, 0.8])
def test_the_budget_is_met_to_less_than_one_component(ratio, layout):
    method = grasp(ratio=ratio)
    method.check(layout)
    blocks = range(method.count(layout))
    kept = {name: list(range(rank)) for name, rank in method.ranks(layout, blocks).items()}
    left = method.budget(layout) - method.decide(layout, kept, []).parameters_after
    assert 0 <= left < min(ref.in_features + ref.out_features for ref in layout.linears)


def test_blocks_are_as_few_as_the_removed_share_allows(layout):
    assert [grasp(ratio=r).count(layout) for r in (0.09, 0.1, 0.18, 0.2, 0.81)] == [1, 2, 2, 3, 9]
    assert grasp(ratio=0.2, removed_share=0.5).count(layout) == 4


def test_every_matrix_keeps_the_same_share_to_one_component(layout):
    method = grasp(ratio=0.2)
    ranks = method.ranks(layout, [3, 5, 8])
    share = 1 - 0.2 * 10 / 3
    for ref in layout.linears:
        if ref.block in (3, 5, 8):
            ideal = share * ref.in_features * ref.out_features / (ref.in_features + ref.out_features)
            assert abs(ranks[ref.name] - ideal) <= 1


def test_removed_is_the_published_rank_and_removes_no_less_than_the_ratio(layout):
    method = grasp(ratio=0.2, selection="removed", removed_share=0.85)
    ranks = method.ranks(layout, range(method.count(layout)))
    # 64 x 64, 32 x 64 and 160 x 64 at 15 %, rounded down.
    assert [ranks[f"model.layers.0.{n}_proj"] for n in ("self_attn.q", "self_attn.k", "mlp.up")] == [4, 3, 6]
    kept = {name: list(range(rank)) for name, rank in ranks.items()}
    assert method.decide(layout, kept, []).parameters_after <= method.budget(layout)


def test_a_share_of_the_score_keeps_the_smallest_set_that_reaches_it(layout):
    score = torch.zeros(64, dtype=torch.float64)
    score[[3, 40, 7, 0]] = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    ref = layout.linears[0]
    kept = [grasp(selection="share", share=s).keep(ref, score, None) for s in (0.4, 0.41, 0.7, 0.9, 1.0)]
    assert kept == [[3], [3, 40], [3, 40], [3, 7, 40], [0, 3, 7, 40]]


def test_a_set_that_saves_nothing_leaves_the_matrix_dense(layout):
    ref = layout.linears[0]
    assert (ref.out_features, ref.in_features) == (64, 64)
    score = torch.ones(64, dtype=torch.float64)
    assert grasp().keep(ref, score, 31) == list(range(31))
    assert grasp().keep(ref, score, 32) is None
    plan = grasp().decide(layout, {}, [])
    assert plan.ranks[ref.name] == 64
    assert plan.parameters_after == plan.parameters_before


def test_blocks_of_least_influence_or_the_run_of_least():
    influence = [0.9, 0.2, 0.5, 0.1, 0.3]
    assert grasp().redundant(influence, 3) == [3, 1, 4]
    assert grasp().redundant(influence, 3, already=[0, 3]) == [0, 3, 1]
    assert grasp(choice="contiguous").redundant(influence, 3) == [3, 4, 5]


def test_scores():
    sigma, change = (torch.tensor(x, dtype=torch.float64) for x in ([3.0, 2.0, 1.0, 0.0], [-0.3, 2.0, -4.0, 0.0]))
    assert grasp().score(sigma, change).tolist() == [0.3, 2.0, 4.0, 0.0]
    assert grasp(metric="gradient").score(sigma, change).tolist() == pytest.approx([0.1, 1.0, 4.0, 0.0])
    assert grasp(metric="magnitude").score(sigma, None) is sigma


def test_components_are_of_single_blocks(layout):
    with pytest.raises(ConfigError, match="truncation=joint joins neighbouring blocks"):
        grasp(truncation=Joint()).check(layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.85}, r"ratio=0\.85 makes all 10 blocks redundant.*method\.ratio to 0\.81 at most"),
        ({"blocks": tuple(range(10))}, r"names all 10 blocks as redundant: leave at least one out"),
        ({"blocks": (2, 12)}, r"no block 12; this model has 0 to 9"),
        ({"blocks": (2,), "ratio": 0.2}, r"too small.*nearest feasible.*ratio 0\.09"),
        (
            {"selection": "removed", "removed_share": 0.97},
            r"leaves no component of model\.layers\.0\.self_attn\.k_proj.*0\.9531 at most",
        ),
    ],
)
def test_what_this_model_cannot_have(settings, message, layout):
    with pytest.raises(ConfigError, match=message):
        grasp(**settings).check(layout)


@pytest.mark.parametrize("nearest", [{"ratio": 0.81}, {"selection": "removed", "removed_share": 0.9531}])
def test_the_nearest_legal_value_that_a_message_names_is_legal(nearest, layout):
    grasp(**nearest).check(layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterative": True}, "set propagate=true"),
        ({"iterative": True, "propagate": True, "blocks": (1,)}, "leave blocks null"),
        ({"iterative": True, "propagate": True, "choice": "contiguous"}, "choice=free"),
        ({"selection": "share"}, "go together"),
        ({"share": 0.5}, "go together"),
        ({"blocks": (1, 1)}, "twice"),
        ({"blocks": ()}, "at least 1"),
        ({"blocks": (-1,)}, "greater than or equal to 0"),
        ({"removed_share": 1.0}, "less than 1"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        grasp(**settings)
