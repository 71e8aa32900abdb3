"""A run is one thing: its rows and weights, its name, and what it left."""

import json
import os
import shutil
import sys

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute


@pytest.fixture
def mine(language_arguments, checkpoint, texts_folder, tmp_path, composed):
    """A configuration whose model and texts are copies that a test may change."""
    model, texts = tmp_path / "mymodel", tmp_path / "texts"
    shutil.copytree(checkpoint("llama"), model)
    shutil.copytree(texts_folder, texts)

    def build(*words):
        return composed(language_arguments("method.ratio=0.4", *words, path=model, data=texts))

    return build, model, texts


def change_rows(model, texts):
    file = texts / "text/mine/test.txt"
    file.write_text(file.read_text().replace("w1 ", "w2 ", 1))


def change_weights(model, texts):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += torch.tensor(1e-3)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def change_tokenizer(model, texts):
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"w05"'))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_rows, "rows of perplexity/mine:test"),
        (change_weights, "model.safetensors of the model"),
        (change_tokenizer, "tokenizer.json of the model"),
    ],
)
def test_a_run_is_not_gone_on_with_on_other_rows_or_weights(mine, change, named):
    build, model, texts = mine
    run = execute(build("run.stages=[calibrate,plan,apply]"))
    before = (run / "manifest.json").read_bytes()
    change(model, texts)
    with pytest.raises(ConfigError) as caught:
        execute(build())
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [named]
    assert (run / "manifest.json").read_bytes() == before
    assert not (run / "results.json").exists()
    execute(build("run.resume=false"))
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def test_a_finished_run_is_not_complete_without_its_figures_or_its_checkpoint(mine):
    build, _, _ = mine
    run = execute(build())
    shutil.copytree(run, run.with_name("copy"))
    execute(build())
    weights = run / "checkpoint/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LowRankKitError, match=r"checkpoint/model\.safetensors was altered"):
        execute(build())
    (run / "results.json").unlink()
    with pytest.raises(LowRankKitError, match=r"results\.json is gone"):
        execute(build())
    # A copy of a whole run is a whole run.
    execute(build(f"run.dir={run.with_name('copy')}"))


def test_a_single_run_of_a_model_given_by_its_path_is_named_after_the_folder(mine, language_arguments, tmp_path):
    _, model, texts = mine
    words = [w for w in language_arguments(path=model, data=texts) if not w.startswith(("model.name=", "method="))]
    command = ["-m", "lowrank_kit.run", "method=none", *words, "run.root=out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = warm.run(command, environment, tmp_path, check=True)
    [run] = (tmp_path / "out").iterdir()
    assert run.name.startswith("none-mymodel-perplexity-")
    assert "none on mymodel" in done.stderr
    assert "none on mymodel" in done.stdout
    assert json.loads((run / "manifest.json").read_text())["model"]["name"] == "mymodel"
    shown = warm.run([*command, "--cfg", "job"], environment, tmp_path)
    assert "name: mymodel\n" in shown.stdout


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.window=5000", "5000"),
        ("task.window=700", r"has \d+ tokens, less than one window"),
        ("calibration.samples=5000", "calibration.samples=5000"),
        ("calibration.seq_len=5000", "calibration.seq_len=5000"),
        ("method.roles=[]", r"method\.roles=\[\] names no linear"),
        ("model.path=/etc/passwd", "'/etc/passwd' is a file"),
    ],
)
def test_what_cannot_be_is_found_before_a_run_directory_is_made(mine, tmp_path, word, message):
    build, _, _ = mine
    with pytest.raises(ConfigError, match=message):
        execute(build(word))
    assert not (tmp_path / "runs").exists()
