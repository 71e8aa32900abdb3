import json
import math
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.laco import LaCo, Merge, MergeTrials
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.plan import Plan

BLOCKS = 8
IDS = torch.arange(3, 15)[None]


def method(**settings):
    return LaCo(**{"name": "laco", "ratio": 0.25, **settings})


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def layout(model):
    return layout_of(model)


def bench_of(model, batch_size=2, lengths=(16, 16, 16, 16)):
    draw = torch.Generator().manual_seed(0)
    sequences = tuple({"input_ids": torch.randint(3, 64, (n,), generator=draw)} for n in lengths)
    return Context(model, layout_of(model), CalibrationSamples(sequences, batch_size=batch_size))


def merged_by_hand(model, merges, differences):
    """The merged model from its state dict alone, with blocks under their original numbers."""
    weights = {name: weight.double() for name, weight in deepcopy(model.state_dict()).items()}
    parts = [name.removeprefix("model.layers.0.") for name in weights if name.startswith("model.layers.0.")]
    for merge in merges:
        for part in parts:
            base = original = weights[f"model.layers.{merge.base}.{part}"]
            if differences == "running" and base.ndim == 1:
                continue
            for member in merge.members:
                base = base + weights[f"model.layers.{member}.{part}"] - (original, base)[differences == "running"]
            weights[f"model.layers.{merge.base}.{part}"] = base
    merged = deepcopy(model)
    merged.load_state_dict({name: weight.float() for name, weight in weights.items()})
    gone = {member for merge in merges for member in merge.members}
    merged.model.layers = torch.nn.ModuleList(b for i, b in enumerate(merged.model.layers) if i not in gone)
    merged.config = deepcopy(model.config)
    merged.model.config = merged.config
    merged.config.num_hidden_layers = len(merged.model.layers)
    return merged


def similarity_by_hand(model, merged, samples):
    found = []
    for sample in samples:
        with torch.no_grad():
            states = [
                m(sample["input_ids"][None], output_hidden_states=True, use_cache=False).hidden_states[-1].flatten()
                for m in (model, merged)
            ]
        found.append(float(torch.cosine_similarity(*states, dim=0)))
    return sum(found) / len(found)


def test_the_published_order_descends_from_below_the_highest_block_and_merges_what_is_left(layout):
    tried = []

    def always(merges):
        tried.append(merges[-1])
        return 1.0

    found = method(ratio=0.85, merged=3, interval=2).scan(layout, 0.5, always)
    # 8 blocks, C = 3: the base 7 - 3 takes 5 and 6; two below, 2 takes 3 and 4, which holds 5 and 6 by then.
    assert tried == [Merge(4, (5, 6)), Merge(2, (3, 4)), Merge(0, (1, 2))]
    assert found.removed == {1, 2, 3, 4, 5, 6}


def test_a_rejected_merge_moves_one_block_down_and_the_last_takes_no_more_than_needed(layout):
    answers = iter([0.4, 0.9, 0.9])
    found = method(ratio=0.3, merged=3, interval=3).scan(layout, 0.5, lambda _: next(answers))
    assert found.merges == (Merge(3, (4, 5)), Merge(0, (1,)))
    assert found.similarities == {4: 0.4, 3: 0.9, 0: 0.9}


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.7])
def test_the_threshold_found_meets_the_ratio_and_a_hundredth_more_does_not(ratio, layout):
    draw = torch.Generator().manual_seed(0)
    table = {}

    def similarity(merges):
        assert merges not in table
        return table.setdefault(merges, float(torch.rand((), generator=draw)))

    chosen, needed = method(ratio=ratio, merged=2), math.ceil(ratio * BLOCKS)
    plan = chosen.decide(layout, similarity)
    threshold = plan.scores["threshold"]
    assert len(plan.kept_blocks) == BLOCKS - needed
    assert chosen.merges(plan) == chosen.scan(layout, threshold, table.__getitem__).merges
    assert len(chosen.scan(layout, threshold + 0.01, table.__getitem__).removed) < needed


@pytest.mark.parametrize("differences", ["original", "running"])
def test_what_is_measured_is_the_merged_model(differences, model, layout):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight) if "norm" in name else 0)
    bench = bench_of(model, lengths=(16, 16, 9, 16))
    trials = MergeTrials(model, layout, bench.samples, differences)
    for merges in ((Merge(4, (5, 6)),), (Merge(4, (5, 6)), Merge(3, (4, 7))), (Merge(2, (3, 4)),)):
        expected = similarity_by_hand(model, merged_by_hand(model, merges, differences), bench.samples.sequences)
        assert trials.similarity(merges) == pytest.approx(expected, abs=1e-6)
        assert expected < 0.999


def test_blocks_that_are_equal_and_idle_merge_without_a_trace(model, layout):
    with torch.no_grad():
        for block in model.model.layers[3:]:
            block.load_state_dict(model.model.layers[3].state_dict())
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        expected = model(IDS).logits
    trials = MergeTrials(model, layout, bench_of(model).samples, "original")
    assert trials.similarity((Merge(4, (5, 6)),)) == pytest.approx(1, abs=1e-12)
    compression = Compression(method(), bench_of(model))
    plan = compression.plan()
    assert plan.kept == {"block 4": [5, 6]}
    with torch.no_grad():
        assert torch.equal(compression.apply(plan)(IDS).logits, expected)


@pytest.mark.parametrize("differences", ["original", "running"])
def test_a_plan_leaves_the_model_alone_and_applies_to_another_from_json(differences, model, tiny_model, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    bench = bench_of(model)
    compression = Compression(method(ratio=0.5, differences=differences), bench)
    compression.calibrate()
    plan = compression.plan()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    compression.plot(plan, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["similarity.png"]
    raw = json.loads(json.dumps(asdict(plan), sort_keys=True))
    read = Plan(**{**raw, "kept_blocks": tuple(raw["kept_blocks"])})
    again = tiny_model("llama", num_hidden_layers=BLOCKS)
    assert Compression(method(ratio=0.5, differences=differences), bench_of(again)).plan() == plan
    by_hand = merged_by_hand(again, compression.method.merges(plan), differences)
    with torch.no_grad():
        first = compression.apply(plan)(IDS).logits
        second = Compression(method(ratio=0.5, differences=differences), bench_of(again)).apply(read)(IDS).logits
        assert torch.equal(first, second)
        torch.testing.assert_close(first, by_hand(IDS, use_cache=False).logits)
    assert len(layout_of(model).blocks) == BLOCKS // 2 == len(plan.kept_blocks)
    assert plan.parameters_after * 2 == plan.parameters_before


def test_every_family_of_blocks_can_be_merged(tiny_model):
    for family in ("opt", "gpt2", "gemma2", "phi3"):
        count = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
        if family == "gemma2":
            count["layer_types"] = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
        model = tiny_model(family, **count)
        compression = Compression(method(), bench_of(model))
        with torch.no_grad():
            assert compression.apply(compression.plan())(IDS).logits.isfinite().all()
        assert len(layout_of(model).blocks) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.9}, r"all 8 blocks would have to go.* method\.ratio to 0\.875"),
        ({"highest": 8}, "legal are 1 to 7"),
        ({"merged": 6, "highest": 4}, "no room for a merge of 6 blocks below block 4"),
        ({"ratio": 0.6, "lowest": 4}, r"takes 5 blocks of 8 away.* 4 and 7, 1 apart, at most 2"),
    ],
)
def test_what_cannot_be_is_said_from_shapes_alone(settings, message, layout):
    with pytest.raises(ConfigError, match=message):
        method(**settings).check(layout)


def test_a_threshold_too_high_for_the_ratio_says_how_far_to_lower_it(layout):
    with pytest.raises(LowRankKitError, match=r"lets 0 blocks go .* takes 2: .* 0\.6000; lower"):
        method(threshold=0.7).decide(layout, lambda _: 0.6)
    assert method(threshold=0.5).decide(layout, lambda _: 0.6).scores["threshold"] == 0.5


def test_states_that_are_not_finite_are_an_error(model, layout):
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.fill_(math.inf)
    trials = MergeTrials(model, layout, bench_of(model).samples, "original")
    with pytest.raises(LowRankKitError, match=r"block 4 .* not finite"):
        trials.similarity((Merge(4, (5, 6)),))
