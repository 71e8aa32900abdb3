import pytest
import torch

from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.narrow import keep_units, narrower_than
from lowrank_kit.models.units import units_of

IDS = torch.arange(3, 27).reshape(2, 12)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2"),
    *("gemma3_text", "gemma3", "gemma", "smollm3", "granite", "cohere2"),
)
KEPT = {"heads": [1], "channels": [3, 4, 11, 30, 47]}


def with_biases(model):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def zero_what_leaves(model, units, kept):
    """Nothing of the other units reaches the residual stream."""
    [ref] = units.columns
    weight = model.get_submodule(ref.name).weight.detach()
    for unit in set(range(units.count)) - set(kept):
        for element in range(weight.shape[1] // units.count):
            weight[:, unit * (weight.shape[1] // units.count) + element] = 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_narrowed_model_is_the_dense_one_with_those_weights_zeroed(tiny_model, family):
    narrowed, dense = (with_biases(tiny_model(family)) for _ in range(2))
    before = dense(IDS).logits
    for units in units_of(layout_of(dense), (0, 2)):
        zero_what_leaves(dense, units, KEPT[units.kind])
        keep_units(narrowed, units, KEPT[units.kind])
    expected = dense(IDS).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(narrowed(IDS).logits, expected, rtol=0, atol=2e-6)


def test_a_block_loses_as_many_parameters_as_its_units_cost(tiny_model):
    model = tiny_model("qwen2")
    parameters = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    units = units_of(layout_of(model), (1,))
    for u in units:
        keep_units(model, u, KEPT[u.kind])
    heads, channels = units
    lost = parameters - sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert lost == heads.cost + (48 - 5) * channels.cost
    assert heads.cost == 32 * 8 * (2 + 1 + 1 + 2)
    assert channels.cost == 3 * 32
    assert narrower_than(model, tiny_model("qwen2")) == {
        "model.layers.1.self_attn.q_proj": [16, 32],
        "model.layers.1.self_attn.k_proj": [8, 32],
        "model.layers.1.self_attn.v_proj": [8, 32],
        "model.layers.1.self_attn.o_proj": [32, 16],
        "model.layers.1.mlp.gate_proj": [5, 32],
        "model.layers.1.mlp.up_proj": [5, 32],
        "model.layers.1.mlp.down_proj": [32, 5],
    }
    assert {ref.name: [*sides] for u in units for ref, *sides in u.sides(len(KEPT[u.kind]))} == narrower_than(
        model, tiny_model("qwen2")
    )


def test_a_units_score_is_the_sum_over_its_weights(tiny_model):
    model = tiny_model("llama")
    heads, channels = units_of(layout_of(model), (1,))
    elements = {name: torch.rand(m.weight.shape) for name, m in model.named_modules() if name.endswith("_proj")}
    block = "model.layers.1."
    q, k, v, o = (elements[f"{block}self_attn.{role}_proj"] for role in "qkvo")
    gate, up, down = (elements[f"{block}mlp.{role}_proj"] for role in ("gate", "up", "down"))
    # 4 query heads of width 12 on 2 key-value heads: the second one has the query heads 2 and 3.
    head = sum(float(rows.double().sum()) for rows in (q[24:], k[12:], v[12:], o[:, 24:]))
    channel = float((gate[7].double() + up[7].double() + down[:, 7].double()).sum())
    assert float(heads.scores(elements)[1]) == pytest.approx(head, rel=1e-12)
    assert float(channels.scores(elements)[7]) == pytest.approx(channel, rel=1e-12)


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2"])
def test_a_family_without_separate_matrices_is_refused(tiny_model, family):
    with pytest.raises(ConfigError, match=rf"llama, mistral.*this {family} has"):
        units_of(layout_of(tiny_model(family)), (0,))
