"""What is written can be read by everyone whom the umask allows."""

import os

import datasets
import pytest
import torch

from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import TrainConfig
from lowrank_kit.models.checkpoint import save_compressed, save_dense
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.weight_files import save_tensors
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapt, adapted


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mode(request):
    """What a new file may be read and written by, under a umask."""
    earlier = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(earlier)


def modes(folder):
    """Of all files below a folder, by name."""
    return {file.name: file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


def test_every_file_that_is_saved_has_the_mode_of_a_new_one(mode, tiny_model, tmp_path):
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    save_compressed(tiny_model("llama"), tmp_path / "sharded", max_shard_size="20KB")
    save_dense(tiny_model("llama"), tmp_path / "dense")
    adapter = adapt(tiny_model("llama"), Lora(name="lora", rank=2), CalibrationSamples(()), task_type="CAUSAL_LM")
    adapter.export(tmp_path / "adapter", "base")
    method, model = FullFineTuning(name="full_ft"), tiny_model("llama")
    full = adapted(
        method,
        model,
        method.plan(layout_of(model), {}),
        {},
        None,
        new_modules=[],
        task_type="CAUSAL_LM",
    )
    full.export(tmp_path / "full", "base")
    found = modes(tmp_path)
    assert {"a.safetensors", "adapter_model.safetensors", "model.safetensors"} <= set(found)
    assert {name: oct(found[name]) for name in found} == {name: oct(mode) for name in found}


def test_the_checkpoints_of_a_training_have_it_too(mode, tiny_model, tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2)
    fit(
        tiny_model("llama"),
        Examples(rows, lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}),
        TrainConfig(max_steps=1, batch_size=2, save_every=1),
        Session(tmp_path, "cpu", 0),
    )
    assert modes(tmp_path)["model.safetensors"] == mode
