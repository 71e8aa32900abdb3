import gc
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.moments import Moments

FOUR = Astra(name="astra", rank=4)


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (n,), generator=generator) for n in (30, 25, 20)]
    return CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=2)


def run(model, cache, method=FOUR, data=None, watch=lambda statistics: None):
    """Calibrate; return what was kept and how many linears were reduced anew."""
    layout, reduced = layout_of(model), []

    def reduce(statistics):
        watch(statistics)
        reduced.append(statistics.ref.name)
        module = model.get_submodule(statistics.ref.name)
        return method.reduce(weight_of(module), module.bias, statistics)

    reduction = Reduction(method.needs(), reduce, depends_on=method.reduction_key())
    kept = calibrate(model, data or samples(), method.targets(layout), reduction, cache=cache)
    return kept, reduced


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, quantities in first.items():
        assert quantities.keys() == second[name].keys()
        for quantity, tensor in quantities.items():
            assert torch.equal(tensor, second[name][quantity])


def test_the_same_again_reads_the_cache_without_running_the_model(tiny_model, tmp_path):
    first, reduced = run(tiny_model("llama"), tmp_path)
    assert len(reduced) == 21
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    second, reduced = run(model, tmp_path)
    assert reduced == []
    assert_identical(first, second)
    without, _ = run(tiny_model("llama"), None)
    assert_identical(first, without)


def test_whatever_the_results_depend_on_makes_a_cache_of_its_own(tiny_model, tmp_path):
    run(tiny_model("llama"), tmp_path)

    def calibrates_anew(model=None, method=None, data=None):
        model = model or tiny_model("llama")
        _, reduced = run(model, tmp_path, method or FOUR, data)
        return len(reduced) > 0

    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    assert calibrates_anew(data=samples(seed=1))
    assert calibrates_anew(model=changed)
    assert calibrates_anew(model=tiny_model("llama").bfloat16())
    assert calibrates_anew(model=tiny_model("llama", rms_norm_eps=1e-2))
    for change in (
        {"subspace": "top"},
        {"rank": 5},
        {"rank_pattern": {"q": 3}},
        {"null_space": True},
        {"allocation": "effective_rank"},
        {"roles": ("q", "o")},
        {"subspace": "random"},
        {"subspace": "random", "seed": 1},
    ):
        assert calibrates_anew(method=FOUR.model_copy(update=change)), change
    assert not calibrates_anew()


def test_settings_that_do_not_matter_share_the_cache(tiny_model, tmp_path):
    first, _ = run(tiny_model("bert", "classification", num_labels=2), tmp_path)
    other_head = tiny_model("bert", "classification", num_labels=2)
    torch.nn.init.normal_(other_head.classifier.weight)
    second, reduced = run(other_head, tmp_path)
    assert reduced == []
    assert_identical(first, second)
    for change in ({"seed": 3}, {"alpha": 2.0}, {"train": "down"}, {"base": "untouched"}, {"rslora": True}):
        assert run(other_head, tmp_path, FOUR.model_copy(update=change))[1] == []


def test_models_of_one_checkpoint_with_different_heads_share_the_cache(tiny_model, tmp_path):
    one, other = tiny_model("llama", "causal"), tiny_model("llama", "classification", num_labels=5)
    other.model.load_state_dict(one.model.state_dict())
    run(one, tmp_path)
    assert run(other, tmp_path)[1] == []


def test_an_interrupted_calibration_resumes_at_the_first_missing_block(tiny_model, tmp_path):
    def stop(statistics):
        if statistics.ref.block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama"), tmp_path, watch=stop)
    resumed, reduced = run(tiny_model("llama"), tmp_path)
    assert {name.split(".")[2] for name in reduced} == {"2"}
    assert_identical(resumed, run(tiny_model("llama"), None)[0])


def kill_in_block_one(model, cache: Path):
    def die(statistics):
        if statistics.ref.block == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(model, cache, watch=die)


def test_a_killed_calibration_resumes_at_the_first_missing_block(tiny_model, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=kill_in_block_one, args=(tiny_model("llama"), tmp_path)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    resumed, reduced = run(tiny_model("llama"), tmp_path)
    assert {name.split(".")[2] for name in reduced} == {"1", "2"}
    assert_identical(resumed, run(tiny_model("llama"), None)[0])


def test_a_half_written_file_is_never_read(tiny_model, tmp_path):
    first, _ = run(tiny_model("llama"), tmp_path)
    (folder,) = tmp_path.iterdir()
    whole = folder / "block-0001.safetensors"
    half = folder / ".block-0001.safetensors.4242.partial"
    half.write_bytes(whole.read_bytes()[:100])
    whole.unlink()
    second, reduced = run(tiny_model("llama"), tmp_path)
    assert {name.split(".")[2] for name in reduced} == {"1"}
    assert_identical(first, second)


@pytest.mark.parametrize(("family", "head"), [("gemma3", "causal"), ("t5", "classification"), ("gpt2", "causal")])
def test_every_kind_of_model_calibrates(tiny_model, tmp_path, family, head):
    model = tiny_model(family, head)
    data = CalibrationSamples(
        tuple({"input_ids": torch.cat([s["input_ids"], torch.tensor([2])])} for s in samples().sequences)
    )
    kept, _ = run(model, tmp_path, data=data)
    assert len(kept) == len(layout_of(model).linears)


def test_moments_of_two_blocks_are_never_alive_together(tiny_model):
    model, alive = tiny_model("llama", num_hidden_layers=4), []

    def count(*_):
        alive.append(sum(type(thing) is Moments for thing in gc.get_objects()))

    handles = [layer.mlp.down_proj.register_forward_hook(count) for layer in model.model.layers]
    gc.collect()
    before = sum(type(thing) is Moments for thing in gc.get_objects())
    run(model, None)
    for handle in handles:
        handle.remove()
    # One Gram each for q k v, o, gate up, down.
    assert max(alive) - before == 4


def test_without_a_cache_nothing_is_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_model("llama"), None)
    assert list(tmp_path.iterdir()) == []


def test_one_request_serves_both_sides():
    assert FOUR.needs() == StatisticsRequest(moments="smaller")
