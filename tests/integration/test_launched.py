"""Runs that a launcher starts: by accelerate as by torchrun, and killed in the middle of their training."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import psutil
import pytest
import torch
import warm
from safetensors.torch import load_file

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.status import read_status

work = SimpleNamespace(**run_path(str(Path(__file__).with_name("processes_at_work.py"))))
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Without --multi_gpu it starts one process where it does not see two GPUs, whatever --num_processes says.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16")


@pytest.fixture
def words(arguments) -> Callable[..., list[str]]:
    """A llama that learns by Astra for 40 steps; its 8 rows a step are 4 for each of two processes."""
    steps = ("train.batch_size=4", "train.gradient_accumulation=2", "train.max_steps=40", "train.save_every=5")
    return lambda *more: arguments(*steps, "train.eval_every=20", *more, family="llama")


def start(launcher: tuple[str, ...], words: list[str], environment: dict[str, str], log: Path) -> psutil.Popen:
    command = [sys.executable, "-m", *launcher, "-m", "lowrank_kit.run", "runtime=ddp", *words]
    with log.open("w") as file:
        return psutil.Popen(command, env=environment, stdout=file, stderr=file)


def finish(launcher: tuple[str, ...], words: list[str], environment: dict[str, str], run: Path) -> str:
    """Start the run, wait for its end; return all that it said."""
    log = run.with_suffix(".log")
    assert start(launcher, [*words, f"run.dir={run}"], environment, log).wait(timeout=240) == 0, log.read_text()
    assert read_status(run).state == "complete"
    return log.read_text()


def kill_in_training(words: list[str], environment: dict[str, str], run: Path, whom: Callable[[psutil.Process], bool]):
    """Kill some of torchrun and the two that it started outright, once there is a second checkpoint."""
    launcher = start(TORCHRUN, [*words, f"run.dir={run}"], environment, run.with_suffix(".log"))
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/checkpoint-1?/trainer_state.json")):
        assert launcher.poll() is None, run.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in filter(whom, processes):
        process.kill()
    return launcher, processes


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def everyone(process: psutil.Process) -> bool:
    return True


def the_second(process: psutil.Process) -> bool:
    return process.environ().get("RANK") == "1"


def the_launcher(process: psutil.Process) -> bool:
    return "RANK" not in process.environ()


@pytest.mark.nightly
def test_accelerate_starts_what_torchrun_starts(words, composed, environment, tmp_path):
    said = finish(ACCELERATE, words("train.max_steps=3"), environment, tmp_path / "two")
    assert "2 processes, ddp" in said
    one = execute(composed(words("train.max_steps=3")))
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


def factors(run: Path) -> dict[str, torch.Tensor]:
    """The compressed weights: of a factored matrix its product, which no choice of signs changes."""
    found = {n: t for file in (run / "checkpoint").glob("*.safetensors") for n, t in load_file(file).items()}
    ups = [name.removesuffix(".up.weight") for name in found if name.endswith(".up.weight")]
    return found | {name: found.pop(f"{name}.up.weight") @ found.pop(f"{name}.down.weight") for name in ups}


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd"])
def test_two_processes_compress_a_streamed_model(method, language_arguments, composed, environment, tmp_path):
    words = language_arguments(
        "method.ratio=0.4", "method.rank_multiple=1", "run.stages=[calibrate,plan,apply]", method=method
    )
    runs = {}
    for weights in ("streamed", "resident"):
        runs[weights] = tmp_path / weights
        apart = environment | {"LOWRANK_KIT_CACHE": str(tmp_path / f"{weights}-cache")}
        more = ("runtime=ddp", f"runtime.weights={weights}", f"run.dir={runs[weights]}")
        ended = warm.run_in_two(["-m", "lowrank_kit.run", *words, *more], apart)
        assert ended.returncode == 0, ended.stderr
    one = execute(composed(words))
    found = factors(runs["streamed"])
    for other, exactly in ((runs["resident"], True), (one, False)):
        plans = [json.loads((run / "plan.json").read_text())["ranks"] for run in (runs["streamed"], other)]
        assert plans[0] == plans[1]
        expected = factors(other)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(found[name], tensor, **tolerance)


@pytest.mark.nightly
@pytest.mark.parametrize("whom", [everyone, the_second])
def test_a_killed_training_goes_on_in_two_processes(whom, words, environment, tmp_path):
    # With dropout, every process has random numbers of its own to go on with.
    words = words("method.dropout=0.1")
    finish(TORCHRUN, words, environment, tmp_path / "whole")
    run = tmp_path / "killed"
    launcher, processes = kill_in_training(words, environment, run, whom)
    psutil.wait_procs(processes, timeout=60)
    assert launcher.returncode != 0
    assert read_status(run).state in ("interrupted", "failed")
    assert "training goes on from step" in finish(TORCHRUN, words, environment, run)
    found, expected = adapter(run), adapter(tmp_path / "whole")
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.nightly
def test_a_training_killed_in_two_processes_goes_on_in_one(words, composed, environment, tmp_path, caplog):
    run = tmp_path / "killed"
    _, processes = kill_in_training(words(), environment, run, everyone)
    psutil.wait_procs(processes, timeout=60)
    with caplog.at_level("INFO", "lowrank_kit"):
        execute(composed(words(f"run.dir={run}")))
    assert "training goes on from step" in caplog.text
    whole = execute(composed(words()))
    for name, tensor in adapter(whole).items():
        torch.testing.assert_close(adapter(run)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_those_whose_launcher_was_killed_keep_the_run(words, composed, environment, tmp_path):
    run = tmp_path / "orphans"
    words = words("train.max_steps=400", f"run.dir={run}")
    launcher, processes = kill_in_training(words, environment, run, the_launcher)
    assert launcher.wait() < 0
    with pytest.raises(LowRankKitError, match="is in use by"):
        execute(composed(words))
    for process in processes[1:]:
        process.kill()


def test_the_precision_is_the_runs_and_not_the_launchers(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    adapters = []
    for told in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        work.training(tmp_path)
        adapters.append(load_file(tmp_path / "single/adapter_model.safetensors"))
    assert all(adapters[1][name].equal(tensor) for name, tensor in adapters[0].items())


def test_what_accelerate_is_told_apart_from_the_run_is_refused(arguments, composed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="told to shard the model"):
        execute(composed(arguments("runtime=ddp")))


def test_accelerate_on_cpus_starts_one_process_and_the_run_says_so(arguments, composed, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="accelerate launch --multi_gpu"):
        execute(composed(arguments("runtime=ddp")))
