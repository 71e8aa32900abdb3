"""A package of one's own, installed by pip, whose parts go with all others by the ordinary command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file
from transformers import StableLmConfig, StableLmForCausalLM

PLUGIN = Path(__file__).parents[1] / "plugin"
RUN_ALL = """
import json, sys
from lowrank_kit.run import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stopped:
        assert not stopped.code, words
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that pip has installed the package into."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(PLUGIN)], check=True)
    return folder


@pytest.fixture
def python(tmp_path):
    """Run Python with these packages beside the installed ones."""

    def run(site: Path, *words: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(site), *sys.path])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LOWRANK_KIT_CACHE": str(tmp_path)}
        return warm.run(words, environment, tmp_path)

    return run


@pytest.fixture
def stablelm(checkpoint, tmp_path) -> Path:
    """A tiny model of a family that the toolkit itself does not know."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = StableLmConfig(vocab_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)
    folder = tmp_path / "stablelm"
    StableLmForCausalLM(config).save_pretrained(folder)
    for file in checkpoint("llama").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_each_part_runs_by_the_ordinary_command(site, python, language_arguments, arguments, stablelm, tmp_path):
    on_stablelm = [f"model.path={stablelm}", "method.ratio=0.3"]
    commands = {
        "minor": arguments("method=minor"),
        "both parts": [
            *language_arguments(*on_stablelm, "method.rank_multiple=1", method="svd_llm"),
            *("truncation=shrunk", "method.truncation.strength=0.02", "allocation=by_depth", "storage=rounded"),
        ],
        "drop_last": language_arguments(*on_stablelm, method="drop_last"),
    }
    words = [[*words, f"run.dir={tmp_path / name}"] for name, words in commands.items()]
    done = python(site, "-c", RUN_ALL, json.dumps(words))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in commands:
        assert json.loads((tmp_path / name / "status.json").read_text())["state"] == "complete"
    plan = json.loads((tmp_path / "both parts" / "plan.json").read_text())
    ranks = [plan["ranks"][f"model.layers.{block}.mlp.up_proj"] for block in range(3)]
    assert ranks[0] < ranks[1] < ranks[2]
    weights = load_file(tmp_path / "both parts" / "checkpoint" / "model.safetensors")
    factors = [tensor for name, tensor in weights.items() if ".up.weight" in name or ".down.weight" in name]
    assert factors
    assert all(factor.bfloat16().float().equal(factor) for factor in factors)
    assert json.loads((tmp_path / "drop_last" / "plan.json").read_text())["kept_blocks"] == [0, 1]
    kept = load_file(tmp_path / "drop_last" / "checkpoint" / "model.safetensors")
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"0", "1"}


def test_help_and_a_misspelt_key_know_its_settings(site, python):
    words = ["-m", "lowrank_kit.run", "method=svd_llm", "truncation=shrunk", "task=perplexity"]
    assert "method.truncation.strength (number >= 0 and <= 1)" in python(site, *words, "--help").stdout
    done = python(site, *words, "method.truncation.strenght=1")
    assert done.returncode == 2
    assert "did you mean 'strength'" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_that_name", "the plug-in 'bad' of bad 1.0 cannot be imported: ModuleNotFoundError"),
        (
            "from typing import Literal\nfrom lowrank_kit.truncations.truncation import Truncation\n"
            "class Mine(Truncation):\n    kind: Literal['optimal'] = 'optimal'\n",
            "the plug-in 'bad' of bad 1.0: bad.Mine has the kind 'optimal' of lowrank_kit.truncations.optimal.Optimal",
        ),
        (
            "from lowrank_kit.models.architectures import architecture_of, register\n"
            "register(architecture_of('llama'), 'llama')\n",
            "the plug-in 'bad' of bad 1.0: the architecture of model type 'llama' is registered already",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_named_with_the_reason(source, message, python, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    facts = tmp_path / "bad-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[lowrank_kit.plugins]\nbad = bad\n")
    done = python(tmp_path, "-m", "lowrank_kit.run", "method=svd_llm", "task=perplexity", "method.rato=1")
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
