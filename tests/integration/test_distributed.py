"""Several processes on one run: the same figures as one, one voice, and the end of all when one ends."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
import warm
from safetensors.torch import load_file

from lowrank_kit.pipeline import execute
from lowrank_kit.runs.status import read_status

WORK = Path(__file__).with_name("processes_at_work.py")
work = SimpleNamespace(**run_path(str(WORK)))


@pytest.fixture(scope="module")
def done(tmp_path_factory, checkpoint):
    """The folder that two processes have left, after everything that they do in one go."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "model").symlink_to(checkpoint("llama"))
    jobs = "calibrated,answered,trained,told,sharded"
    ended = warm.run_in_two([str(WORK), str(folder), jobs], work.ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def alone(done, tmp_path):
    """A folder for one process, with the same model."""
    (tmp_path / "model").symlink_to(done / "model")
    return tmp_path


def test_all_sums_of_a_calibration_are_those_of_one_process(done, alone):
    expected = work.calibration(alone)
    for rank in range(2):
        found = torch.load(done / f"calibration-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # The same float64 sums in another order; what Astra keeps of them is eigenvectors, up to their sign.
            if " kept " not in name:
                torch.testing.assert_close(
                    found[name].double(), tensor.double(), rtol=1e-6 if " g " in name else 1e-12, atol=1e-12
                )
            elif tensor.ndim == 2:
                one, two = (part.double() @ part.double().T for part in (tensor, found[name]))
                torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-8)


def test_each_process_reads_its_share_into_one_cache(done, alone):
    work.calibration(alone)
    keys = [{path.name for path in (folder / "cache").iterdir()} for folder in (done, alone)]
    assert keys[0] == keys[1] != set()
    # Of five batches.
    assert [json.loads((done / f"told-{rank}.json").read_text())["batches"] for rank in range(2)] == [3, 2]


def test_all_get_the_answers_that_one_process_gets(done, alone):
    expected = json.loads(json.dumps(work.answers(alone)))
    for rank in range(2):
        found = json.loads((done / f"answered-{rank}.json").read_text())
        assert found["generate_until"] == expected["generate_until"]
        for kind in ("loglikelihood", "fewer than processes"):
            for (value, is_greedy), (one, is_greedy_there) in zip(found[kind], expected[kind], strict=True):
                assert (value, is_greedy) == (pytest.approx(one, rel=1e-12), is_greedy_there)
        assert found["windows"] == pytest.approx(expected["windows"], rel=1e-12)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_adapter_learns_the_same_in_two_processes(kind, done, alone):
    work.training(alone)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (alone / "single", done / kind))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_sharding_was_real(done):
    told = [json.loads((done / f"sharded-{rank}.json").read_text()) for rank in range(2)]
    # The first process gathers what learnt; the frozen base stays split in halves.
    assert [facts["up"] for facts in told] == ["Parameter", "DTensor"]
    assert [facts["base"] for facts in told] == ["DTensor", "DTensor"]
    assert sum(facts["held"] for facts in told) == pytest.approx(told[0]["whole"], rel=0.01)


def test_what_the_first_process_raises_all_raise(done):
    assert [json.loads((done / f"told-{rank}.json").read_text())["heard"] for rank in range(2)] == ["no room"] * 2


def test_one_that_fails_ends_all(tmp_path):
    started = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, str(WORK), str(tmp_path), "one_fails"], env=work.ENVIRONMENT, capture_output=True
    )
    assert ended.returncode == 1
    assert time.monotonic() - started < 60


def figures(run):
    return {
        (r["task"], r["metric"], r["checkpoint"], r["step"]): r["value"]
        for r in json.loads((run / "results.json").read_text())
    }


def launched(words, environment):
    ended = warm.run_in_two(["-m", "lowrank_kit.run", *words], environment)
    return ended, [line for line in ended.stdout.splitlines() if line.startswith("run: ")]


def test_a_run_in_two_processes_is_the_run_of_one(checkpoint, arguments, composed, environment, tmp_path):
    # Without dropout, which every process draws for its own rows.
    model = shutil.copytree(checkpoint("bert"), tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(settings | no_dropout))
    words = arguments("train.save_every=2", f"model.path={model}")
    ended, last = launched([*words, "runtime=ddp", f"run.root={tmp_path / 'two'}"], environment)
    assert ended.returncode == 0, ended.stderr
    # One voice: each of its lines once.
    assert len(last) == 1
    assert ended.stderr.count("training ") == 1
    assert "2 processes, ddp" in ended.stderr
    two, one = Path(last[0].removeprefix("run: ")), execute(composed(words))
    assert two.name == one.name
    assert read_status(two).state == "complete"
    assert figures(two) == pytest.approx(figures(one))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    found, expected = (load_file(run / "adapter/adapter_model.safetensors") for run in (two, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["runtime"] == {"kind": "ddp", "processes": 2}


def test_benchmarks_in_two_processes_are_those_of_one(
    language_arguments, composed, environment, questions_folder, tmp_path, monkeypatch
):
    words = language_arguments("task=smoke", "task.perplexity=true", method="none", data=questions_folder)
    ended, last = launched([*words, "runtime=ddp", f"run.root={tmp_path / 'two'}"], environment)
    assert ended.returncode == 0, ended.stderr
    two = Path(last[0].removeprefix("run: "))
    # What other runs have answered is known to all: this one is to answer for itself.
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "another cache"))
    one = execute(composed(words))
    assert figures(two) == pytest.approx(figures(one), rel=1e-4)
    for mine, its in zip(sorted(two.glob("samples/*/*")), sorted(one.glob("samples/*/*")), strict=True):
        assert mine.relative_to(two) == its.relative_to(one)
        pairs = zip(
            *([json.loads(line) for line in file.read_text().splitlines()] for file in (mine, its)), strict=True
        )
        for sample, expected in pairs:
            assert sample.pop("log_likelihoods") == pytest.approx(expected.pop("log_likelihoods"), rel=1e-4)
            assert sample == expected


@pytest.mark.nightly
def test_a_compression_in_two_processes_is_that_of_one(language_arguments, composed, environment, tmp_path):
    words = language_arguments(
        "method.ratio=0.4", "recovery=lora", "recovery.data=text", "train.max_steps=4", "train.batch_size=4"
    )
    ended, last = launched([*words, "runtime=ddp", f"run.root={tmp_path / 'two'}"], environment)
    assert ended.returncode == 0, ended.stderr
    two, one = Path(last[0].removeprefix("run: ")), execute(composed(words))
    assert figures(two) == pytest.approx(figures(one), rel=1e-4)


@pytest.mark.nightly
def test_a_failure_of_all_is_told_with_the_right_status(arguments, environment, tmp_path):
    folder = tmp_path / "run"
    ended, _ = launched(
        arguments("runtime=ddp", "method=lora", "train.learning_rate=1e30", f"run.dir={folder}"), environment
    )
    assert ended.returncode == 1
    assert "training lost its way" in ended.stderr
    assert read_status(folder).state in ("failed", "interrupted")
