"""Runs, their report, and the command that the report gives for a figure, run again."""

import csv
import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import warm

from lowrank_kit.pipeline import execute
from lowrank_kit.report.__main__ import main


@pytest.fixture
def trained(config, tmp_path) -> Path:
    """A method with two seeds, and one run that never got to its end."""
    for seed in (0, 1):
        execute(config("method=astra", f"seed={seed}"))
    execute(config("method=lora", "seed=2", "run.stages=[calibrate,plan]"))
    return tmp_path / "runs"


@pytest.mark.draws
def test_the_command_in_the_report_makes_the_same_figure_again(trained, tmp_path, capsys, environment):
    assert main([str(trained), "--output", str(tmp_path / "report")]) == 0
    assert "Left out, 1:" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "report/table.csv").open()))
    [row] = [r for r in rows if (r["method"], r["kind"]) == ("astra", "measured")]
    found = [json.loads(file.read_text()) for file in trained.glob("astra-*/results.json")]
    values = [r["value"] for records in found for r in records if r["checkpoint"] == "final"]
    assert float(row["mean"]) == pytest.approx(sum(values) / 2)
    # One method is compared with none.
    assert (row["seeds"], row["significant"]) == ("2", "")
    program, *words = shlex.split(row["command"])
    assert words[:3] == ["-m", "lowrank_kit.run", "-m"]
    assert program == "python"
    warm.run([*words, f"run.root={tmp_path / 'again'}"], environment, check=True)
    # The same configuration has the same name.
    assert {p.name for p in (tmp_path / "again").iterdir()} >= {p.name for p in trained.glob("astra-*")}
    for file in trained.glob("astra-*/results.json"):
        assert json.loads((tmp_path / "again" / file.parent.name / "results.json").read_text()) == json.loads(
            file.read_text()
        )


def test_a_tracker_that_fails_at_every_call_costs_no_result(config, monkeypatch, caplog):
    import wandb

    class Broken:
        offline, dir = True, ""

        def __getattr__(self, name: str) -> Any:
            raise ConnectionError(f"no {name} today")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    monkeypatch.setattr(logging.getLogger("lowrank_kit"), "propagate", True)
    folder = execute(config("tracker=wandb"))
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    assert json.loads((folder / "results.json").read_text())
    for name in ("log", "summary", "log_artifact", "finish"):
        assert f"no {name} today" in caplog.text


def test_a_run_without_a_tracker_never_imports_wandb(arguments, environment):
    code = "import sys; from lowrank_kit.run import main; main(sys.argv[1:]); assert 'wandb' not in sys.modules"
    warm.run(["-c", code, *arguments()], environment, check=True)
