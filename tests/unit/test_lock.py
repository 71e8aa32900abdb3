"""Processes that contend for a lock, that die while they hold it, and that share one calibration."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.lock import SILENCE_SECONDS, Holder, Lock, exclusively

# Each process enters once; inside, a folder that only one can make at a time stands for the work.
ENTER = """
import sys, time
from pathlib import Path
from lowrank_kit.lock import exclusively
folder = Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.001)
with exclusively(folder / "the.lock", "work", seconds_between_looks=0.01):
    (folder / "inside").mkdir()
    time.sleep(0.02)
    (folder / "inside").rmdir()
"""
COMPUTE = """
import logging, sys, time
from pathlib import Path
import torch
from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.calibration.store import CalibrationStore
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
root, wait_after = Path(sys.argv[1]), sys.argv[2]
key = StatisticsKey("a test", "blocks", "", {}, "float32", "cpu", "", "", 1, {}, "")
store = CalibrationStore(root, key)
with store.missing(range(3)) as missing:
    for block in sorted(missing):
        time.sleep(0.1)
        store.save(block, {"linear": {"gram": torch.full((2, 2), float(block))}})
        print(f"computed {block}", flush=True)
        if str(block) == wait_after:
            time.sleep(600)
print("read", [store.load(block)["linear"]["gram"][0, 0].item() for block in range(3)], flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(path: Path, holder: Holder, seconds_ago: float) -> None:
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - seconds_ago,) * 2)


@pytest.mark.parametrize("stale", [False, True])
def test_one_process_at_a_time_and_every_one_gets_in(tmp_path, stale):
    if stale:
        left_behind(tmp_path / "the.lock", Holder(hostname="elsewhere"), 2 * SILENCE_SECONDS)
    processes = [start(ENTER, tmp_path) for _ in range(8)]
    time.sleep(1.0)
    (tmp_path / "go").touch()
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["go"]


def test_a_calibration_that_many_ask_for_is_computed_once(tmp_path):
    outputs = [p.communicate(timeout=60)[0].splitlines() for p in [start(COMPUTE, tmp_path, "-") for _ in range(4)]]
    computed = [line for lines in outputs for line in lines if line.startswith("computed")]
    assert sorted(computed) == ["computed 0", "computed 1", "computed 2"]
    assert [lines[-1] for lines in outputs] == ["read [0.0, 1.0, 2.0]"] * 4


def test_who_waits_says_for_whom_and_goes_on_where_a_killed_one_stopped(tmp_path):
    first = start(COMPUTE, tmp_path, "1")
    assert [first.stdout.readline() for _ in range(2)] == ["computed 0\n", "computed 1\n"]
    second = start(COMPUTE, tmp_path, "-")
    assert f"waiting for the calibration that process {first.pid} on " in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    output, _ = second.communicate(timeout=30)
    assert "lock.json was left by process" in output
    assert [line for line in output.splitlines() if line.startswith("computed")] == ["computed 2"]
    assert output.splitlines()[-1] == "read [0.0, 1.0, 2.0]"
    assert not list(tmp_path.glob("**/*lock.json*"))


def test_another_hosts_holder_is_judged_by_its_heartbeat_alone(tmp_path):
    there = Holder(hostname="elsewhere", pid=1)
    left_behind(tmp_path / "l", there, SILENCE_SECONDS / 2)
    assert Lock(tmp_path / "l").try_acquire() == there
    left_behind(tmp_path / "l", there, 2 * SILENCE_SECONDS)
    lock = Lock(tmp_path / "l")
    assert lock.try_acquire() is None
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_start_of_the_same_slurm_job_is_dead_whatever_its_heartbeat_says(tmp_path, monkeypatch):
    earlier = Holder(hostname="elsewhere", slurm_job="7", slurm_restart=0)
    left_behind(tmp_path / "l", earlier, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Lock(tmp_path / "l").try_acquire() == earlier
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = Lock(tmp_path / "l")
    assert lock.try_acquire() is None
    lock.release()


def test_a_holder_that_was_taken_over_leaves_the_others_lock_alone(tmp_path):
    lock = Lock(tmp_path / "l")
    assert lock.try_acquire() is None
    other = replace(Holder(), hostname="elsewhere")
    left_behind(tmp_path / "l", other, 0)
    lock.release()
    assert Lock(tmp_path / "l").try_acquire() == other


def test_threads_of_one_process_take_turns_too(tmp_path):
    inside, most = [], []

    def enter() -> None:
        with exclusively(tmp_path / "l", "work", seconds_between_looks=0.01):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_what_is_finished_is_read_without_the_lock(tmp_path):
    key = StatisticsKey("a test", "blocks", "", {}, "float32", "cpu", "", "", 1, {}, "")
    store = CalibrationStore(tmp_path, key)
    with store.missing([]) as missing:
        assert missing == set()
        assert not list(tmp_path.glob("*/lock*"))
