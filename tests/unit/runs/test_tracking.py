import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from lowrank_kit.config import TrackerConfig
from lowrank_kit.plots.figure import panels, save
from lowrank_kit.runs.tracking import NullTracker, open_tracker, run_id

CONFIG = {"method": {"name": "astra", "rank": 8}, "model": {"name": "minilm_l6"}, "task": {"name": "glue/rte"}}
OFFLINE = TrackerConfig(kind="wandb", mode="offline", project="tests", group="seeds")


def test_metrics_config_and_exit_code_reach_the_disk_without_a_network(tmp_path, wandb_records):
    folder = tmp_path / "astra-minilm_l6-glue_rte-0123abcd-s1"
    folder.mkdir()
    tracker = open_tracker(OFFLINE, folder, CONFIG)
    for step in (10, 20):
        tracker.log({"train/loss": 1.0 / step}, step)
    tracker.summary({"rte/accuracy": 0.75})
    tracker.finish(1)

    [run] = wandb_records(folder)
    assert [(row["_step"], row["train/loss"]) for row in run["history"]] == [(10, 0.1), (20, 0.05)]
    assert (run["id"], run["project"], run["group"]) == (folder.name, "tests", "seeds")
    assert run["config"]["method"] == CONFIG["method"]
    assert (run["job_type"], set(run["tags"])) == ("astra", {"astra", "minilm_l6", "glue/rte"})
    assert run["summary"]["rte/accuracy"] == 0.75
    assert run["exit_code"] == 1


def test_plots_tables_and_artefacts_of_the_run_directory_are_sent(tmp_path, wandb_records):
    folder = tmp_path / "sweep/run"
    for name, rows in {
        "final": [{"row": 0, "acc": 1.0, "log_likelihoods": [-1.0, -2.0]}],
        "dense": [{"row": 0}],
    }.items():
        file = folder / "samples" / name / "piqa.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [{"task": "piqa", "metric": "acc", "value": 1.0, "stderr": None, "versions": {"torch": "2"}}]
    (folder / "results.json").write_text(json.dumps(records))
    (folder / "plan.json").write_text("{}")
    (folder / "plots").mkdir()
    figure, _ = panels(1)
    save(figure, folder / "plots/rank_map.png")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/weights").write_bytes(b"w" * 1000)
    settings = OFFLINE.model_copy(update={"samples": True, "checkpoint": True, "group": None})
    tracker = open_tracker(settings, folder, CONFIG)
    tracker.finish(0)

    [run] = wandb_records(folder)
    assert run["group"] == "sweep"
    assert run["exit_code"] == 0
    [media] = run["history"]
    kinds = {key.removesuffix("._type"): kind for key, kind in media.items() if key.endswith("._type")}
    tables = dict.fromkeys(("evaluation", "samples/final/piqa", "samples/dense/piqa"), "table-file")
    assert kinds == {"plots/rank_map": "image-file", **tables}
    files = next(folder.glob("wandb/offline-run-*/files"))
    assert (files / media["plots/rank_map.path"]).read_bytes() == (folder / "plots/rank_map.png").read_bytes()
    table = json.loads((files / media["evaluation.path"]).read_text())
    assert table["columns"] == ["task", "metric", "value", "stderr", "versions"]
    assert table["data"] == [["piqa", "acc", 1.0, None, '{"torch": "2"}']]
    sample = json.loads((files / media["samples/final/piqa.path"]).read_text())
    assert sample["data"] == [[0, 1.0, "[-1.0, -2.0]"]]
    # W&B makes one of every table besides.
    ours = {name: files for name, files in run["artefacts"].items() if name.startswith(run_id(folder))}
    assert list(ours.values()) == [{"plan.json", "results.json"}, {"weights"}]
    assert run["system_metrics"]


def test_samples_and_checkpoint_are_sent_on_request_only(tmp_path, wandb_records):
    (tmp_path / "samples/final").mkdir(parents=True)
    (tmp_path / "samples/final/piqa.jsonl").write_text('{"row": 0}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/weights").write_bytes(b"w")
    (tmp_path / "log.txt").write_text("line")
    open_tracker(OFFLINE, tmp_path, CONFIG).finish(1)
    [run] = wandb_records(tmp_path)
    assert run["history"] == []
    assert list(run["artefacts"].values()) == [{"log.txt"}]
    assert run["exit_code"] == 1


def test_the_environment_decides_where_nothing_is_chosen(tmp_path, wandb_records):
    code = f"""
import sys
from pathlib import Path
from lowrank_kit.config import TrackerConfig
from lowrank_kit.runs.tracking import open_tracker
open_tracker(TrackerConfig(kind="wandb"), Path(sys.argv[1]), {CONFIG}).finish(0)
"""
    # W&B looks at the environment once a process.
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"WANDB_MODE": "offline"})
    assert len(wandb_records(tmp_path)) == 1


def test_a_tracker_that_cannot_start_warns_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    import wandb

    def offline(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, "init", offline)
    with caplog.at_level(logging.WARNING, "lowrank_kit"):
        tracker = open_tracker(OFFLINE, tmp_path, CONFIG)
    assert isinstance(tracker, NullTracker)
    assert "ConnectionError: no network" in caplog.text


def test_a_tracker_that_breaks_at_every_call_warns(tmp_path, caplog):
    tracker = open_tracker(TrackerConfig(kind="wandb", mode="disabled"), tmp_path, CONFIG)
    (tmp_path / "results.json").write_text('[{"value": 1.0}]')
    tracker._run = None
    with caplog.at_level(logging.WARNING, "lowrank_kit"):
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"loss": 1.0})
        tracker.finish(0)
    # Metrics, summary, media, artefacts, end: none keeps the next from being tried.
    warnings = [r.name for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings.count("lowrank_kit.runs.tracking") == 5


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
