"""What only a process of its own can show: console, exit status, tracker, an installed wheel."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]


def test_a_tracked_run_reads_well_and_leaves_its_curves(command, environment, tmp_path, wandb_records):
    folder = tmp_path / "run"
    words = (
        "tracker=wandb",
        "tracker.mode=offline",
        "tracker.project=tests",
        f"run.dir={folder}",
        "train.max_steps=25",
    )
    done = warm.run(command(*words), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"run: {folder}"
    # Our own lines alone, each with its time: no bars, no reports of libraries, no warnings.
    noise = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert noise == []
    for expected in ("astra on bert", "train: 48 rows, local: ", "training ", "accuracy 0.", "train, "):
        assert expected in done.stderr
    assert "glue/rte │ accuracy" in done.stdout
    assert "training " in (folder / "log.txt").read_text()

    [tracked] = wandb_records(folder)
    assert [row["_step"] for row in tracked["history"] if "train/loss" in row] == [1, 10, 20]
    assert {row["_step"] for row in tracked["history"] if "eval/accuracy" in row} == {*range(2, 25, 2), 25}
    assert tracked["config"]["method"]["rank"] == 2
    [final] = [r["value"] for r in json.loads((folder / "results.json").read_text()) if r["checkpoint"] == "final"]
    assert tracked["summary"]["glue/rte/accuracy/final"] == final
    assert tracked["exit_code"] == 0


def test_a_failed_run_is_failed_for_the_tracker_too(command, environment, tmp_path, wandb_records):
    folder = tmp_path / "run"
    words = ("tracker=wandb", "tracker.mode=offline", f"run.dir={folder}", "method=lora", "train.learning_rate=1e30")
    done = warm.run(command(*words), environment)
    assert done.returncode == 1
    assert "training lost its way" in done.stderr
    assert "Traceback" not in done.stderr
    [tracked] = wandb_records(folder)
    assert tracked["exit_code"] == 1


def test_a_run_that_was_killed_after_its_last_stage_still_tells_the_tracker(
    command, environment, tmp_path, wandb_records
):
    folder = tmp_path / "run"
    words = command("tracker=wandb", "tracker.mode=offline", f"run.dir={folder}", "method=lora")
    assert warm.run(words, environment).returncode == 0
    status = json.loads((folder / "status.json").read_text())
    results = (folder / "results.json").read_bytes()
    # As it is while the tracker is being told.
    (folder / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    for _ in range(2):
        assert warm.run(words, environment).returncode == 0
    first, second = wandb_records(folder)
    assert first["id"] == second["id"]
    assert [tracked["exit_code"] for tracked in (first, second)] == [0, 0]
    assert second["summary"]["glue/rte/accuracy/final"] == first["summary"]["glue/rte/accuracy/final"]
    assert (folder / "results.json").read_bytes() == results


@pytest.mark.skipif(find_spec("hatchling") is None, reason="building a wheel needs hatchling: install .[test]")
def test_an_installed_wheel_finds_its_configuration_from_anywhere(environment, tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, env=environment, cwd=ROOT, capture_output=True, check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    inside = {
        str(p.relative_to(tmp_path / "site/lowrank_kit/conf")) for p in tmp_path.glob("site/lowrank_kit/conf/**/*.yaml")
    }
    assert inside == {str(p.relative_to(ROOT / "conf")) for p in ROOT.glob("conf/**/*.yaml")}
    assert (tmp_path / "site/lowrank_kit/py.typed").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    others = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    alone = environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *others])}
    shown = warm.run(["-m", "lowrank_kit.run", "--cfg", "job", "method.rank=5"], alone, cwd=elsewhere)
    assert shown.returncode == 0, shown.stderr
    assert "rank: 5" in shown.stdout
    where = warm.run(["-c", "import lowrank_kit; print(lowrank_kit.__file__)"], alone, cwd=elsewhere)
    assert where.stdout.startswith(str(tmp_path / "site"))
    assert list(elsewhere.iterdir()) == []
