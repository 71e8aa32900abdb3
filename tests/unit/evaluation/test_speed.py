import pytest
import torch
from torch import nn

from lowrank_kit.config import SpeedConfig
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.speed import (
    LiveTensors,
    Speed,
    check_positions,
    ideal_speedup,
    measure_speed,
    speed_records,
    speedup,
)

SETTINGS = SpeedConfig(batch_size=2, prompt_tokens=16, new_tokens=4, repeats=3)


def test_multiplications_agree_with_a_count_by_hand(tiny_model):
    model = tiny_model("llama")
    [speed] = measure_speed({"dense": model}, SETTINGS).values()
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    head, width = 32 * 64, 4 * 12
    # Attention: queries by keys, and weights by values, in each of 3 blocks; the head reads one position of 16.
    assert speed.prefill_multiplies_per_token == linears + 3 * 2 * 16 * width + head / 16
    keys = sum(range(17, 21)) / 4
    assert speed.decode_multiplies_per_token == linears + 3 * 2 * keys * width + head


def test_every_model_is_measured_in_every_repeat(tiny_model):
    order = []

    def watched(name: str):
        model = tiny_model("opt")
        model.register_forward_pre_hook(lambda *_: order.append(name))
        return model

    found = measure_speed({"dense": watched("d"), "compressed": watched("c")}, SETTINGS)
    # One forward pass reads the prompt, four read one token each.
    assert "".join(order[-30:]) == ("d" * 5 + "c" * 5) * 3
    for speed in found.values():
        assert len(speed.prefill_seconds) == len(speed.decode_seconds) == 3
        assert (speed.prefill_tokens, speed.decode_tokens) == (32, 8)
        assert min(*speed.prefill_seconds, *speed.decode_seconds) > 0


def test_a_narrower_model_needs_fewer_bytes_and_multiplications(tiny_model):
    dense, narrow = tiny_model("llama", intermediate_size=480), tiny_model("llama")
    found = measure_speed({"dense": dense, "compressed": narrow}, SETTINGS)
    assert found["dense"].parameter_bytes == 4 * sum(p.numel() for p in dense.parameters())
    assert found["compressed"].parameter_bytes < found["dense"].parameter_bytes
    assert found["compressed"].peak_extra_bytes < found["dense"].peak_extra_bytes
    assert min(ideal_speedup(found["dense"], found["compressed"])) > 1


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_other_families_are_measured(tiny_model, family):
    settings = SpeedConfig(batch_size=1, prompt_tokens=8, new_tokens=2, repeats=1)
    [speed] = measure_speed({"dense": tiny_model(family)}, settings).values()
    assert speed.decode_multiplies_per_token > speed.prefill_multiplies_per_token > 0


def test_more_tokens_than_positions_are_refused(tiny_model):
    config = tiny_model("gpt2").config
    check_positions(SpeedConfig(prompt_tokens=38, new_tokens=2), config)
    with pytest.raises(ConfigError, match="more than the model's 40 positions"):
        check_positions(SpeedConfig(prompt_tokens=39, new_tokens=2), config)


def test_live_tensors_are_counted_for_as_long_as_they_live():
    given = torch.ones(1000)
    with LiveTensors() as live:
        a = given + 1
        b = a.view(10, 100).t()
        del a
        c = b.contiguous()
        c += 1
        del b, c
        given[:500].mul_(2)
        last = torch.zeros(1000)
    assert live.peak_bytes == 8000
    assert live._now_bytes == last.nbytes == 4000


def made(prefill: tuple[float, ...], decode: tuple[float, ...], multiplies: float) -> Speed:
    return Speed(prefill, decode, 100, 10, 8, 16, multiplies, 2 * multiplies)


def test_a_pause_of_the_machine_does_not_change_the_speedup():
    dense = made((2.0, 20.0, 2.0), (3.0, 3.0, 3.0), 50.0)
    compressed = made((1.0, 10.0, 1.0), (2.0, 2.0, 99.0), 25.0)
    assert speedup(dense, compressed) == (2.0, 1.5)
    assert ideal_speedup(dense, compressed) == (2.0, 2.0)
    assert dense.prefill_tokens_per_second == 50.0
    assert dense.decode_tokens_per_second == pytest.approx(10 / 3)


def test_records_hold_both_models_and_their_ratios():
    dense, compressed = made((2.0,), (3.0,), 50.0), made((1.0,), (2.0,), 25.0)
    records = speed_records(dense, compressed, "batch 2", {"torch": "2"})
    found = {(r.metric, r.checkpoint): r.value for r in records}
    assert {r.task for r in records} == {"speed"}
    assert found["prefill_tokens_per_second", "dense"] == 50.0
    assert found["prefill_tokens_per_second", "final"] == 100.0
    assert found["prefill_speedup", "final"] == 2.0
    assert found["decode_ideal_speedup", "final"] == 2.0
    assert found["parameter_bytes", "final"] == 8.0
