"""A run directory of which something is gone, altered, cut short or of other rows and weights is never whole."""

import errno
import json
import os

import pytest

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.lock import Lock
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.status import read_status


@pytest.fixture
def finished(make):
    """A finished run with a result, a plan, a manifest and a checkpoint."""
    with RunDirectory.open(make()) as run:
        run.write_json("plan.json", {"ranks": {}})
        run.write_json("manifest.json", {"git": None})
        with run.write_folder("checkpoint") as folder:
            (folder / "model.safetensors").write_bytes(bytes(range(256)))
        run.mark("apply")
        run.write_json("results.json", [])
        run.mark("evaluate")
    assert read_status(run.path).state == "complete"
    return run.path


FILES = ["results.json", "plan.json", "manifest.json", "config.yaml", "checkpoint/model.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_finished_run_of_which_a_file_is_gone_is_damaged(finished, make, name):
    (finished / name).unlink()
    status = read_status(finished)
    assert (status.state, status.error) == ("damaged", f"{name} is gone")
    with pytest.raises(LowRankKitError, match=rf"{name} is gone.*run\.resume=false"):
        RunDirectory.open(make())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_named(finished, make, name):
    data = bytearray((finished / name).read_bytes())
    # The letter that begins a configuration, whatever its length.
    data[0] ^= 1
    (finished / name).write_bytes(data)
    assert read_status(finished).error == f"{name} was altered"
    with pytest.raises(LowRankKitError, match=f"{name} was altered"):
        RunDirectory.open(make())
    if name == "config.yaml":
        # Whose run it is cannot be told any more.
        with pytest.raises(LowRankKitError, match=r"choose another run\.dir"):
            RunDirectory.open(make(resume=False))
        return
    with RunDirectory.open(make(resume=False)) as run:
        assert not run.done("evaluate")


def test_a_bit_that_was_flipped_behind_the_clocks_back_is_found_when_the_run_goes_on(finished, make):
    file = finished / "checkpoint/model.safetensors"
    times = file.stat()
    file.write_bytes(bytes(256))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(LowRankKitError, match=r"model\.safetensors was altered"):
        RunDirectory.open(make())


def test_what_a_run_does_again_itself_is_no_damage(finished, make):
    with RunDirectory.open(make()) as run:
        assert run.was_complete
        run.forget("evaluate", "results.json")
        run.write_json("manifest.json", {"git": "other"})
        run.write_json("results.json", [1])
    with RunDirectory.open(make()) as run:
        assert run.was_complete
        assert not run.done("evaluate")


@pytest.mark.parametrize("text", ["", '{"state": "comp', "null", "[]", '{"state": "finished"}', '{"files": {"a": 1}}'])
def test_a_status_that_is_not_whole_is_named_with_the_remedy(finished, make, text):
    (finished / "status.json").write_text(text)
    with pytest.raises(LowRankKitError, match=r"status\.json' is damaged \(.*\): .*run\.resume=false"):
        RunDirectory.open(make())
    with RunDirectory.open(make(resume=False)):
        pass


@pytest.mark.parametrize("text", ["", '{"tok', '{"token": 1}', "[]"])
def test_a_lock_that_is_not_whole_is_named_with_the_remedy(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(LowRankKitError, match=r"lock\.json' is damaged .*remove this file"):
        Lock(tmp_path / "lock.json").try_acquire()


def test_work_of_other_rows_or_weights_is_refused_and_named(make):
    before = {"rows": {"a:train": "1", "a:test": "2"}, "model": {"model.safetensors": "3"}}
    with RunDirectory.open(make(), lambda: before) as run:
        run.mark("calibrate")
    with RunDirectory.open(make(), lambda: before) as run:
        assert run.done("calibrate")
    now = {"rows": {"a:train": "1", "a:test": "0"}, "model": {"model.safetensors": "9", "extra.json": "1"}}
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(make(), lambda: now)
    assert "run.resume=false" in str(caught.value)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "rows of a:test",
        "model.safetensors of the model",
        "extra.json of the model (new)",
    ]
    with RunDirectory.open(make(resume=False), lambda: now) as run:
        assert not run.done("calibrate")
    assert json.loads((run.path / "inputs.json").read_text()) == now


def test_what_a_killed_process_left_half_is_removed_at_the_next_start(make):
    with RunDirectory.open(make()) as run:
        pass
    for name in (".checkpoint-a1b2c3d4", ".recovered-a1b2c3d4", ".adapter.tmp", ".plots.old"):
        (run.path / name).mkdir()
        (run.path / name / "half").touch()
    (run.path / "samples/final").mkdir(parents=True)
    for name in (".results.json.host.123.partial", ".status.json.h.9.partial", "samples/final/.piqa.jsonl.h.7.partial"):
        (run.path / name).touch()
    mine = run.path / ".mine-a1b2c3d4"
    mine.touch()
    with RunDirectory.open(make()):
        hidden = {path.name for path in run.path.rglob(".*")}
        assert hidden == {mine.name}


def read_only(monkeypatch):
    def refuse(*_arguments, **_named):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)


def test_a_finished_run_on_a_read_only_disk_can_be_shown(finished, make, monkeypatch):
    with RunDirectory.open(make(stages=["apply", "evaluate"])):
        pass
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    read_only(monkeypatch)
    with RunDirectory.open(make(stages=["apply", "evaluate"])) as run:
        assert run.was_complete
        assert run.done("evaluate")
    with pytest.raises(LowRankKitError, match=r"cannot be written to: Read-only file system; choose another run\.dir"):
        RunDirectory.open(make(stages=["train"]))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
