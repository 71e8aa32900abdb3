import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_kit.errors import ConfigError, LowRankKitError, of_the_machine
from lowrank_kit.files import write_whole
from lowrank_kit.lock import SILENCE_SECONDS
from lowrank_kit.runs.directory import RunDirectory, run_name
from lowrank_kit.runs.status import Status, read_status

HOLDER = """
import sys, time
from pathlib import Path
from lowrank_kit.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])) as run:
    run.begin("train")
    run.mark("calibrate")
    with run.write_folder("checkpoint") as folder:
        (folder / "half").write_text("written")
        print("holding", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    path = tmp_path / "held"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    yield path, process
    process.kill()
    process.wait()


def test_a_killed_run_is_interrupted_and_its_directory_is_free_again(holder):
    path, process = holder
    assert read_status(path).state == "running"
    assert read_status(path).stage == "train"
    with pytest.raises(LowRankKitError, match=rf"in use by process {process.pid} on \S+;"):
        RunDirectory(path)

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((path / "status.json").read_text())["state"] == "running"
    assert read_status(path).state == "interrupted"
    assert not (path / "checkpoint").exists()

    with RunDirectory(path) as run:
        assert run.done("calibrate")
        assert not run.done("train")
        assert read_status(path).pid == os.getpid()
        with run.write_folder("checkpoint") as folder:
            assert list(folder.iterdir()) == []
    assert read_status(path).state == "complete"


def test_a_killed_child_nobody_waited_for_counts_as_dead(holder):
    path, process = holder
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_status(path).state == "interrupted"


def test_a_reused_pid_is_not_taken_for_the_run():
    mine = Status("running")
    assert mine.process_alive()
    assert not replace(mine, process_started=mine.process_started - 100).process_alive()


def test_another_hosts_process_is_judged_by_its_heartbeat():
    there = Status("running", hostname="elsewhere")
    assert there.process_alive()
    assert not replace(there, updated=there.updated - 2 * SILENCE_SECONDS).process_alive()


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("no"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(143), "interrupted")],
)
def test_the_status_says_how_the_run_ended(tmp_path, error, state):
    def work() -> None:
        with RunDirectory(tmp_path / "r") as run:
            run.begin("train")
            raise error

    with pytest.raises(type(error)):
        work()
    status = read_status(tmp_path / "r")
    assert (status.state, status.stage) == (state, "train")
    assert status.error.startswith(type(error).__name__)


def test_no_status_where_there_is_no_run(tmp_path):
    assert read_status(tmp_path) is None


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    with RunDirectory(tmp_path / "r") as run:
        run.write_json("results.json", [1])

        def full(_descriptor: int) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="disk full"):
                run.write_json("results.json", [1, 2])
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_json("results.json", [float("nan")])
        assert json.loads((run.path / "results.json").read_text()) == [1]


def test_what_a_killed_process_left_half_goes_at_the_next_try(tmp_path):
    names = []
    write_whole(tmp_path / "a", lambda partial: (names.append(partial.name), partial.touch()))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    halves = [tmp_path / names[0].replace(str(os.getpid()), str(pid)) for pid in (dead.pid, os.getppid())]
    for half in halves:
        half.touch()
    write_whole(tmp_path / "a", lambda partial: partial.touch())
    # The other's is still at work.
    assert {f.name for f in tmp_path.iterdir()} == {"a", halves[1].name}


def test_a_full_disk_releases_the_run(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> None:
        with RunDirectory(tmp_path / "r") as run:
            monkeypatch.setattr(os, "fsync", full)
            run.write_json("results.json", [1])

    with pytest.raises(OSError, match=r"results\.json") as caught:
        work()
    message = str(of_the_machine(caught.value))
    assert message == f"'{tmp_path / 'r/results.json'}': No space left on device: make room on that disk"
    assert [f.name for f in (tmp_path / "r").iterdir()] == ["status.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(run: RunDirectory) -> None:
        with run.write_folder("adapter") as folder:
            (folder / "half").touch()
            raise RuntimeError("killed")

    with RunDirectory(tmp_path / "r") as run:
        with run.write_folder("adapter") as folder:
            (folder / "old").touch()
        with pytest.raises(RuntimeError, match="killed"):
            fail(run)
        assert [p.name for p in (run.path / "adapter").iterdir()] == ["old"]
        with run.write_folder("adapter") as folder:
            (folder / "new").touch()
        assert [p.name for p in (run.path / "adapter").iterdir()] == ["new"]
    assert sorted(p.name for p in run.path.iterdir()) == ["adapter", "status.json"]


def test_name_tells_results_apart_and_nothing_else(make):
    base = run_name(make())
    assert base.startswith("tiny-minilm_l6-glue_rte-")
    assert base.endswith("-s0")
    assert run_name(make(root="elsewhere", stages=["train"], resume=False)) == base
    assert run_name(make(rank=5)) != base
    assert run_name(make(seed=1)) == base.removesuffix("-s0") + "-s1"


def test_the_same_configuration_finds_its_work_again(make):
    with RunDirectory.open(make()) as run:
        run.mark("calibrate")
    with RunDirectory.open(make(stages=["train"])) as again:
        assert again.path == run.path
        assert again.done("calibrate")
    with RunDirectory.open(make(resume=False)) as fresh:
        assert fresh.path == run.path
        assert not fresh.done("calibrate")


def test_an_explicit_directory_refuses_another_configuration(make, tmp_path):
    folder = str(tmp_path / "mine")
    with RunDirectory.open(make(dir=folder)) as run:
        before = (run.path / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(make(dir=folder, rank=5, seed=7))
    assert caught.value.exit_status == 2
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "method.rank: 4 there, 5 now",
        "seed: 0 there, 7 now",
    ]
    assert (Path(folder) / "config.yaml").read_text() == before
    with RunDirectory.open(make(dir=folder, resume=False)):
        pass
