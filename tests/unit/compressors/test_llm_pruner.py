import copy

import pytest
import torch

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.llm_pruner import LLMPruner
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of


def method(**settings):
    return LLMPruner(**({"name": "llm_pruner", "protect_first": 0, "protect_last": 1, "ratio": 0.3} | settings))


@pytest.fixture
def samples():
    ids = torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(0))
    return CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=4)


@pytest.fixture
def work(samples):
    def build(model, cache=None, **settings):
        shared = {} if cache is None else {"cache": cache}
        return Compression(method(**settings), Context(model, layout_of(model), samples, **shared))

    return build


def linear_parameters(model):
    return sum(model.get_submodule(ref.name).weight.numel() for ref in layout_of(model).linears)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.4, 0.45, 0.49])
def test_the_budget_is_met_to_less_than_a_channel(tiny_model, work, family, ratio):
    model = tiny_model(family)
    compression = work(model, ratio=ratio, importance="magnitude")
    plan, before = compression.plan(), linear_parameters(model)
    after = linear_parameters(compression.apply(plan))
    assert (plan.parameters_before, plan.parameters_after) == (before, after)
    budget = compression.method.budget(compression.context.layout)
    assert budget - 3 * 32 < after <= budget
    for ref in layout_of(model).linears:
        assert plan.ranks[ref.name] == ref.full_rank


def test_heads_go_in_whole_numbers_below_the_share_and_channels_make_up(tiny_model):
    layout = layout_of(tiny_model("llama", num_attention_heads=8, num_key_value_heads=8))
    # The one open block of three can lose a third: nearly all of this block.
    removed = method(protect_first=1, ratio=0.2).removed(layout)
    assert removed["block 1 heads"] == int(0.6 * 8)
    assert set(removed) == {"block 1 heads", "block 1 channels"}


def test_channels_are_spread_evenly(tiny_model):
    removed = method(protect_last=0, ratio=0.15).removed(layout_of(tiny_model("llama")))
    counts = [removed[f"block {block} channels"] for block in range(3)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_taylor_scores_are_those_of_plain_autograd(tiny_model, samples, work):
    model = tiny_model("qwen3")
    twin = copy.deepcopy(model)
    lost = sum(twin(input_ids=s["input_ids"][None], labels=s["input_ids"][None]).loss for s in samples.sequences)
    (lost / len(samples.sequences)).backward()
    compression = work(model)
    scores, plan = compression.calibrate(), compression.plan()
    for block, layer in enumerate(twin.model.layers[:2]):
        mlp = layer.mlp
        change = {p: (p.weight * p.weight.grad).detach() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)}
        expected = torch.tensor(
            [
                sum(float(value) for p, by in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1))
                    for value in change[p].select(by, channel).abs())
                for channel in range(48)
            ]
        )  # fmt: skip
        found = scores[f"block {block} channels"]
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)
        kept = plan.kept[f"block {block} channels"]
        assert min(found[kept]) >= max(v for i, v in enumerate(found) if i not in kept)
        # The signed sum over a column of down is the slope of a multiplier on that channel, and is another thing.
        assert not torch.allclose(change[mlp.down_proj].sum(0).abs(), change[mlp.down_proj].abs().sum(0))


def test_a_multiplier_on_a_channel_has_the_signed_sum_as_its_slope(tiny_model, samples):
    model = tiny_model("llama")
    ids = samples.sequences[0]["input_ids"][None]
    multiplier = torch.ones(48, requires_grad=True)
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: (inputs[0] * multiplier,))
    model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    torch.testing.assert_close((down.weight * down.weight.grad).sum(0), multiplier.grad, rtol=1e-3, atol=1e-8)


def test_planning_leaves_the_model_alone_and_is_read_from_the_cache(tiny_model, work, tmp_path, monkeypatch):
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    plan = work(model, tmp_path).plan()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr("lowrank_kit.compressors.llm_pruner.weight_gradients", None)
    assert work(model, tmp_path).plan() == plan
    other = work(model, tmp_path, ratio=0.32).plan()
    assert all(set(other.kept[name]) <= set(kept) for name, kept in plan.kept.items())


def test_several_passes_give_what_one_does(tiny_model, work, monkeypatch):
    whole = work(tiny_model("llama")).plan()
    monkeypatch.setattr("lowrank_kit.compressors.llm_pruner.STATISTICS_BYTES", 1)
    assert work(tiny_model("llama")).plan().kept == whole.kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protect_first": 4}, r"protect all 3 blocks: their sum can be 2 at most"),
        ({"protect_last": 5}, r"protect all 3 blocks"),
        ({"ratio": 0.7}, r"2 of 3 blocks .* nearest feasible ratio is 0\.\d+"),
    ],
)
def test_what_cannot_be_is_said_from_shapes(tiny_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        method(**settings).check(layout_of(tiny_model("llama")))


def test_the_nearest_feasible_ratio_is_feasible_and_the_next_is_not(tiny_model):
    layout = layout_of(tiny_model("mistral"))
    with pytest.raises(ConfigError) as error:
        method(ratio=0.9).check(layout)
    nearest = float(str(error.value).split("feasible ratio is ")[1].split(";")[0])
    method(ratio=nearest).check(layout)
    with pytest.raises(ConfigError):
        method(ratio=nearest + 2e-4).check(layout)
