from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.shortgpt import ShortGPT
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of

INFLUENCE = [0.9, 0.2, 0.5, 0.1, 0.3, 0.8]


def method(**settings):
    return ShortGPT(**{"name": "shortgpt", "ratio": 0.3, **settings})


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", num_hidden_layers=6)


@pytest.fixture
def layout(model):
    return layout_of(model)


@pytest.fixture
def bench(model, layout):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 64, (4, 16), generator=draw)
    return Context(model, layout, CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=2))


def planned(layout, distances=INFLUENCE, **settings):
    values = torch.tensor(INFLUENCE, dtype=torch.float64)
    return method(**settings).decide(layout, values, torch.tensor(distances, dtype=torch.float64))


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.01, (0, 1, 2, 4, 5)), (0.3, (0, 2, 4, 5)), (0.5, (0, 2, 5)), (0.8, (0,))]
)
def test_the_blocks_of_lowest_influence_go_as_few_as_reach_the_ratio(ratio, kept, layout):
    plan = planned(layout, ratio=ratio)
    assert plan.kept_blocks == kept
    assert plan.parameters_after <= (1 - ratio) * plan.parameters_before
    assert plan.parameters_after + plan.parameters_before // 6 > (1 - ratio) * plan.parameters_before
    assert plan.scores == {f"block {i}": value for i, value in enumerate(INFLUENCE)}
    gone = {ref.block for ref in layout.linears if plan.ranks[ref.name] == 0}
    assert gone == set(range(6)) - set(kept)


def test_a_contiguous_choice_takes_the_run_with_the_least_distance_across_it(layout):
    plan = planned(layout, [0.7, 0.6, 0.5, 0.2, 0.4], choice="contiguous")
    assert plan.kept_blocks == (0, 1, 2, 5)
    assert plan.scores["blocks 3-4"] == 0.2


def test_forced_blocks_go_whatever_their_influence(layout):
    assert planned(layout, blocks=(5, 0), choice="contiguous").kept_blocks == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.9}, r"all 6 blocks would have to go.* method\.ratio to 0\.8333"),
        ({"blocks": (1, 6)}, "no block 6; legal are 0 to 5"),
        ({"blocks": (1,)}, r"takes 2: name more, or lower method\.ratio to 0\.1666"),
        ({"blocks": tuple(range(6))}, "names all 6 blocks"),
    ],
)
def test_what_cannot_be_is_said_from_shapes_alone(settings, message, layout):
    with pytest.raises(ConfigError, match=message):
        method(**settings).check(layout)


@pytest.mark.parametrize("blocks", [(1, 1), (-1,)])
def test_blocks_named_twice_or_below_zero_are_no_settings(blocks):
    with pytest.raises(ValidationError):
        method(blocks=blocks)


@pytest.mark.parametrize("settings", [{}, {"choice": "contiguous", "distance": "angular"}])
def test_a_plan_leaves_the_model_alone_and_another_process_applies_it(settings, model, bench, tiny_model, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    chosen = method(**settings)
    compression = Compression(chosen, bench)
    compression.calibrate()
    plan = compression.plan()
    compression.plot(plan, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["influence.png"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    span, distance = chosen.span(bench.layout), chosen.distance
    expected = block_influence(model, bench.samples, distance=distance, span=span)
    names = [f"block {i}" if span == 1 else f"blocks {i}-{i + 1}" for i in range(len(expected))]
    assert [plan.scores[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-5)
    again = tiny_model("llama", num_hidden_layers=6)
    other = Context(again, layout_of(again), replace(bench.samples, batch_size=4))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        first, second = (Compression(chosen, b).apply(plan)(ids).logits for b in (bench, other))
    assert torch.equal(first, second)
    assert len(layout_of(model).blocks) == 4


def test_a_block_that_does_nothing_goes_first(model, bench):
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(ids).logits
        compression = Compression(method(ratio=0.1), bench)
        plan = compression.plan()
        assert plan.kept_blocks == (0, 1, 3, 4, 5)
        assert torch.equal(compression.apply(plan)(ids).logits, expected)
