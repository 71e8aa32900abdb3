"""The benchmarks for a GPU, rehearsed on a CPU at tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/run.sh"
PARTS = ["correctness", "scale", "eigen", "whole", "speed", "adapters", "forms"]


def rehearse(out, *parts):
    command = ["bash", str(SCRIPT), str(out), "--rehearse", *parts]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LOWRANK_KIT_GPU_SECONDS": "3600"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_part_leaves_its_figures_and_is_gone_on_with(tmp_path):
    done = rehearse(tmp_path, "eigen")
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "eigen.json"
    left = json.loads(file.read_text())
    assert left["state"] == "done"
    assert left["rehearsed"]
    assert {"card", "driver", "versions", "revision", "command"} <= left.keys()
    assert {"32", "48", "32, together"} <= left["figures"].keys()
    # As if it had been stopped: what is missing is measured, and nothing else.
    left["figures"].pop("48")
    left["figures"]["32"]["seconds"] = -1.0
    left["figures"]["32, together"] = {"error": "it was the machine"}
    file.write_text(json.dumps(left))
    assert rehearse(tmp_path, "eigen").returncode == 0
    again = json.loads(file.read_text())["figures"]
    assert again["32"]["seconds"] == -1.0
    assert again["48"]["seconds"] > 0
    assert "error" not in again["32, together"]


@pytest.mark.nightly
def test_every_part(tmp_path):
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.stem for file in tmp_path.glob("*.json")) == sorted(PARTS)
    # What a machine gives back: few files, flat.
    assert len(list(tmp_path.iterdir())) == len(PARTS) + 1
