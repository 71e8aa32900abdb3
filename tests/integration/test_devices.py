"""Every method does on another device what it does on the CPU: nothing is left on the wrong one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("devices_at_work.py")
# The others are variations of these.
QUICK = ["svd_llm, pivots", "kfac_svd of experts", "grasp", "kfac_svd, channels", "llm_pruner", "astra", "corda"]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def outcomes(device, cases):
    # In a process of its own: what torch is told of the other device cannot be taken back.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), device, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.rsplit(": ", 1) if line.endswith(": equal") else line.split(": ", 1)
                 for line in done.stdout.splitlines() if ": " in line)  # fmt: skip
    assert found
    return found


@pytest.mark.parametrize(
    ("device", "cases"),
    [
        ("elsewhere", QUICK),
        pytest.param("elsewhere", [], marks=pytest.mark.nightly),
        pytest.param("cuda", [], marks=GPU),
    ],
)
def test_methods_compute_the_same_there(device, cases):
    found = outcomes(device, cases)
    assert set(cases) <= found.keys()
    assert {name: outcome for name, outcome in found.items() if outcome != "equal"} == {}
