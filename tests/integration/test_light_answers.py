"""What is answered from the settings alone never waits for torch: the import costs more than the answer."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lowrank_kit.compose import Composer

HEAVY = ["torch", "transformers", "peft", "scipy", "sympy", "sklearn", "datasets", "pandas", "matplotlib", "accelerate"]
ASK = """
import contextlib, io, json, sys
from lowrank_kit.run import main
answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(words)
    loaded = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    answers.append({"said": out.getvalue() + err.getvalue(), "loaded": loaded})
"""
COMPUTE = """
from lowrank_kit.adapters.milora import Milora
import torch
weight = (torch.arange(12.0) ** 2 % 7).reshape(3, 4)
factors = Milora(name="milora", rank=1).initialise(weight, {}, 1)
answers.append((factors.up @ factors.down).tolist())
"""
METHODS = Composer().options["method"]


@pytest.fixture(scope="module")
def ask():
    def ask(commands: list[list[str]], then: str = "") -> list:
        words = [sys.executable, "-c", f"{ASK}{then}print(json.dumps(answers))"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [*words, json.dumps(commands), json.dumps(HEAVY)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_a_misspelt_key_of_any_method_is_answered_without_torch(ask):
    answers = ask([[f"method={name}", "task=perplexity", "method.nmae=1"] for name in METHODS])
    assert len(answers) == len(METHODS)
    for name, answer in zip(METHODS, answers, strict=True):
        assert "method.nmae is not a key; did you mean 'name'?" in answer["said"], name
        assert answer["loaded"] == [], name


def test_bad_values_sweeps_and_help_are_answered_without_torch(ask):
    commands = {
        "method.rank=0 should be greater than or equal to 1": ["method=astra", "method.rank=0"],
        "allocation.kind='hisdv' is not legal": ["method=svd_llm", "method.allocation.kind=hisdv"],
        "task=perplexitty is not an option": ["method=astra", "task=perplexitty"],
        "train.max_steps='many' should be": ["method=astra", "train.max_steps=many"],
        "in 4 of 4 jobs": ["-m", "method=astra,lora", "method.rank=2,4", "train.lr=1"],
        "method.subspace": ["method=astra", "--help"],
        "method.truncation": ["method=svd_llm", "task=perplexity", "--help"],
        "_target_: lowrank_kit.adapters.lora.Lora": ["method=lora", "--cfg", "job"],
    }
    for expected, answer in zip(commands, ask(list(commands.values())), strict=True):
        assert expected in answer["said"]
        assert answer["loaded"] == [], expected


def test_a_method_whose_settings_were_read_first_computes_as_ever(ask):
    [_, product] = ask([["method=milora", "--help"]], then=COMPUTE)
    u, s, vh = np.linalg.svd((np.arange(12.0) ** 2 % 7).reshape(3, 4), full_matrices=False)
    np.testing.assert_allclose(product, s[2] * np.outer(u[:, 2], vh[2]), atol=1e-6)
