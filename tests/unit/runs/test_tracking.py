import json
import logging
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.config import TrackerConfig
from lowrank_kit.runs.tracking import NullTracker, open_tracker, run_id

OFFLINE = TrackerConfig(kind="wandb", mode="offline", project="tests", group="seeds")


def read_offline(folder: Path) -> Iterator[Any]:
    """Records of an offline run: a 7-byte header, then LevelDB log blocks of 32 KiB holding protobuf."""
    from wandb.proto import wandb_internal_pb2 as pb

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_metrics_config_and_exit_code_reach_the_disk_without_a_network(tmp_path):
    folder = tmp_path / "astra-minilm_l6-glue_rte-0123abcd-s1"
    folder.mkdir()
    tracker = open_tracker(OFFLINE, folder, {"method": {"rank": 8}})
    for step in (10, 20):
        tracker.log({"train/loss": 1.0 / step}, step)
    tracker.summary({"rte/accuracy": 0.75})
    tracker.finish(1)

    records = list(read_offline(folder))
    history = [values(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert [(row["_step"], row["train/loss"]) for row in history] == [(10, 0.1), (20, 0.05)]
    [run] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.run_group) == (folder.name, "tests", "seeds")
    assert values(run.config.update)["method"] == {"rank": 8}
    summaries = [values(r.summary.update) for r in records if r.WhichOneof("record_type") == "summary"]
    assert any(s.get("rte/accuracy") == 0.75 for s in summaries)
    [end] = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


def test_a_failing_tracker_warns_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    import wandb

    def offline(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, "init", offline)
    with caplog.at_level(logging.WARNING, "lowrank_kit"):
        tracker = open_tracker(OFFLINE, tmp_path, {})
    assert isinstance(tracker, NullTracker)
    assert "ConnectionError: no network" in caplog.text


def test_a_tracker_that_breaks_in_mid_run_warns(tmp_path, caplog):
    tracker = open_tracker(TrackerConfig(kind="wandb", mode="disabled"), tmp_path, {})
    tracker._run = None
    with caplog.at_level(logging.WARNING, "lowrank_kit"):
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"loss": 1.0})
        tracker.finish(0)
    assert [r.name for r in caplog.records].count("lowrank_kit.runs.tracking") == 3


def test_without_a_tracker_wandb_is_never_imported(tmp_path):
    code = """
import sys
from pathlib import Path
from lowrank_kit.config import TrackerConfig
from lowrank_kit.runs.tracking import open_tracker
tracker = open_tracker(TrackerConfig(), Path(sys.argv[1]), {})
tracker.log({"loss": 1.0}, 1)
tracker.finish(0)
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "my run #1"])
def test_chosen_names_are_made_unique_by_their_path(tmp_path, name):
    ids = {run_id(tmp_path / parent / name) for parent in "ab"}
    assert len(ids) == 2
    assert all(not set(i) & set("/\\#?%: ") for i in ids)
