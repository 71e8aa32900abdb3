import json
from pathlib import Path

import pytest
import torch

from lowrank_kit.errors import ConfigError
from lowrank_kit.pipeline import execute


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.rank=33"], r"method\.rank=33 does not fit .*32x32"),
        (["method.roles=[qq]"], "no linear of this bert has the role 'qq'; did you mean 'q'"),
        (["calibration.samples=0"], r"calibration\.samples=0"),
        (["calibration.on=text"], r"calibration\.on=text: task=glue/rte has no texts"),
        (["method.subspace=tale"], r"method\.subspace='tale' is not legal; did you mean 'tail'"),
        (["data.root=null"], r"data=local needs a folder"),
        (["data.root=nowhere"], r"data\.root: there is no folder 'nowhere'"),
        (["eval.held_out=48"], r"eval\.held_out=48 leaves nothing to train on: glue/rte has 48"),
        (["task=glue/cola"], r"no split 'train' of 'glue/cola'.*sets here: glue/mnli, glue/rte"),
        (["model.path=packaged://minilm"], "did you mean 'minilm_l6'"),
        (["model.path=./nowhere"], "'./nowhere' does not exist"),
        (["device=cuda:77"], "device=cuda:77: torch .* sees"),
        (["~method.rank", "method=lora", "method.rank_pattern={qk: 3}"], r"rank_pattern: 'qk' matches no"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(config, tmp_path, words, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        execute(config(*words))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model_type", ["vit", "mamba", "no_such_type"])
def test_a_model_type_that_is_not_known_is_named(config, tmp_path, model_type):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=model_type):
        execute(config(f"model.path={folder}"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "w1", "sentence2": "w2", "label": -1}, "labels -1 of 'train' are not classes 0 to 1"),
        ({"sentence1": "w1", "sentence2": "w2", "label": "yes"}, "labels 'yes' of 'train'"),
        ({"sentence1": "w1", "label": 1}, "no column sentence2; they have sentence1, label"),
        ({"sentence1": "w1", "sentence2": None, "label": 1}, "'sentence2' of 'train' holds None"),
    ],
)
def test_rows_that_cannot_be_used_are_told_apart(config, tmp_path, row, message):
    folder = tmp_path / "rows/glue/rte"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message):
        execute(config(f"data.root={tmp_path / 'rows'}"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.assets
def test_packaged_rows_do_not_have_every_task(config, asset, monkeypatch):
    monkeypatch.delenv("LOWRANK_KIT_CACHE")
    asset("benchmark_rows")
    with pytest.raises(ConfigError, match="no split 'train' of 'glue/cola'"):
        execute(config("data=packaged", "data.root=null", "task=glue/cola"))
    assert not Path(config().run.root).exists()


def test_lost_weights_end_the_training_with_advice(config, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint("bert").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"loss is nan at step 1; lower train\.learning_rate") as caught:
        execute(
            config("method=lora", f"model.path={broken}", f"run.dir={tmp_path / 'run'}", "eval.effects.enabled=false")
        )
    assert type(caught.value).__name__ == "LowRankKitError"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["stage"]) == ("failed", "train")
    assert "loss is nan" in status["error"]
    assert "train" in json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
