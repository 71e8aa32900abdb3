import logging
import subprocess
import sys
from typing import Any

import pytest

from lowrank_kit.config import TrackerConfig
from lowrank_kit.runs.tracking import NullTracker, open_tracker, run_id

OFFLINE = TrackerConfig(kind="wandb", mode="offline", project="tests", group="seeds")


def test_metrics_config_and_exit_code_reach_the_disk_without_a_network(tmp_path, wandb_records):
    folder = tmp_path / "astra-minilm_l6-glue_rte-0123abcd-s1"
    folder.mkdir()
    tracker = open_tracker(OFFLINE, folder, {"method": {"rank": 8}})
    for step in (10, 20):
        tracker.log({"train/loss": 1.0 / step}, step)
    tracker.summary({"rte/accuracy": 0.75})
    tracker.finish(1)

    [run] = wandb_records(folder)
    assert [(row["_step"], row["train/loss"]) for row in run["history"]] == [(10, 0.1), (20, 0.05)]
    assert (run["id"], run["project"], run["group"]) == (folder.name, "tests", "seeds")
    assert run["config"]["method"] == {"rank": 8}
    assert run["summary"]["rte/accuracy"] == 0.75
    assert run["exit_code"] == 1


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
