import math
from dataclasses import replace

import pytest
import torch

from lowrank_kit.calibration.influence import block_influence, hidden_distance
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.plots.block_scores import plot_influence

LENGTHS = (9, 12, 5, 20, 3)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (n,), generator=generator) for n in LENGTHS]
    return CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=2)


def states_of(model, layout, sample):
    """Hidden states in float64 of one unpadded sample: the model's own, the last one by a hook before the norm."""
    last = []
    handle = model.get_submodule(layout.final_norm).register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        output = model.double()(sample["input_ids"][None], output_hidden_states=True, use_cache=False)
    handle.remove()
    assert not torch.allclose(output.hidden_states[-1], last[0])
    return [state[0] for state in (*output.hidden_states[:-1], last[0])]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("span", [1, 2])
def test_influence_is_the_mean_over_real_tokens_of_a_direct_computation(family, span, tiny_model, samples):
    layout = layout_of(tiny_model(family))
    reference = tiny_model(family)
    cosines = []
    for sample in samples.sequences:
        states = states_of(reference, layout, sample)
        pairs = zip(states, states[span:], strict=False)
        cosines.append(torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]))
    cosine = torch.cat(cosines, dim=1)
    assert cosine.shape == (4 - span, sum(LENGTHS))
    model = tiny_model(family).train()
    for distance, expected in (("cosine", 1 - cosine), ("angular", cosine.arccos() / math.pi)):
        found = block_influence(model, samples, distance=distance, span=span)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected.mean(1), rtol=1e-5, atol=0)
    assert model.training


def test_small_angles_keep_their_digits():
    angles = torch.tensor([1e-3, 1e-6, 1e-9, math.pi / 2, math.pi - 1e-6], dtype=torch.float64)
    first = torch.tensor([3.0, 0.0], dtype=torch.float64).expand(1, 5, 2)
    second = 0.5 * torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = hidden_distance(first, second, mask, "angular")
    torch.testing.assert_close(found, angles / math.pi, rtol=1e-7, atol=0)
    expected = 2 * (angles / 2).sin().square()
    torch.testing.assert_close(hidden_distance(first, second, mask), expected, rtol=1e-7, atol=0)


def test_a_block_that_does_nothing_has_no_influence(tiny_model, samples):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = block_influence(model, samples, distance="angular")
    assert found[1] == 0
    assert found[[0, 2]].min() > 0.01


def test_padding_and_batches_do_not_matter(tiny_model, samples):
    model = tiny_model("llama")
    alone, together = (block_influence(model, replace(samples, batch_size=size)) for size in (1, 5))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=0)


def test_what_was_measured_is_read_again_for_the_same_model_and_samples_only(
    tiny_model, samples, tmp_path, monkeypatch
):
    model = tiny_model("llama")
    first = block_influence(model, samples, cache=tmp_path)
    assert torch.equal(first, block_influence(model, samples))
    monkeypatch.setattr(type(model.base_model), "forward", None)
    assert torch.equal(block_influence(model, samples, cache=tmp_path), first)
    for other, settings in ((model, {"span": 2}), (model, {"distance": "angular"}), (tiny_model("llama", seed=1), {})):
        with pytest.raises(TypeError, match="NoneType"):
            block_influence(other, samples, cache=tmp_path, **settings)


def test_an_encoder_decoder_model_is_refused(tiny_model, samples):
    model = tiny_model("t5", "seq2seq")
    with pytest.raises(LowRankKitError, match="encoder and a decoder"):
        block_influence(model, samples)


def test_states_that_are_not_finite_are_named(tiny_model, samples):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(LowRankKitError, match=r"model\.layers\.1 are not finite"):
        block_influence(model, samples)


def test_the_picture_tells_removed_blocks_from_kept_ones(tmp_path):
    influence = [0.3, 0.1, math.nan, 0.2]
    panel = plot_influence(influence, {1}, tmp_path / "influence.png").axes[0]
    kept, removed = panel.containers
    assert [bar.get_height() for bar in removed] == [0.1]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in kept] == [0, 2, 3]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["kept", "removed"]
    assert (tmp_path / "influence.png").is_file()
