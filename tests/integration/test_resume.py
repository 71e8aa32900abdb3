import json
import signal
import time
from pathlib import Path

import pytest
import warm
from safetensors.torch import load_file

from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation import glue
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.status import read_status

STEPS = ("train.max_steps=120", "train.save_every=5", "train.eval_every=50", "method.dropout=0.1")


def read(file: Path):
    return json.loads(file.read_text())


def kill_in_training(command, environment, run: Path, sign: int) -> int:
    """Start a run, send the signal once it has left two checkpoints, return its exit status."""
    process = warm.Command(command, environment)
    deadline = time.monotonic() + 90
    while not list(run.glob("checkpoints/checkpoint-1?/trainer_state.json")):
        assert process.is_alive(), process.stderr
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.005)
    process.send_signal(sign)
    return process.wait()


@pytest.mark.parametrize("method", [("method.base=residual",), ("method.base=untouched", "method.train=down")])
def test_a_killed_training_goes_on_and_ends_bit_for_bit_the_same(
    config, command, environment, tmp_path, caplog, method
):
    whole = execute(config(*STEPS, *method, f"run.dir={tmp_path / 'whole'}"))
    run = tmp_path / "killed"
    words = (*STEPS, *method, f"run.dir={run}")
    assert kill_in_training(command(*words), environment, run, signal.SIGKILL) == -signal.SIGKILL
    assert read_status(run).state == "interrupted"
    assert read_status(run).stages_done == ("calibrate", "plan", "apply")
    [good] = sorted(run.glob("checkpoints/checkpoint-*/trainer_state.json"))[-1:]
    # Halves that a process killed while saving leaves: without a state, and with half of one.
    for name, state in (("checkpoint-100", None), ("checkpoint-115", good.read_text()[:200])):
        half = run / "checkpoints" / name
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half")
        if state is not None:
            (half / "trainer_state.json").write_text(state)

    with caplog.at_level("INFO", "lowrank_kit"):
        execute(config(*words))
    assert "training goes on from step " in caplog.text
    assert read_status(run).state == "complete"
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert read(run / "results.json") == read(whole / "results.json")
    steps = [[entry["step"] for entry in read(path / "history.json")] for path in (run, whole)]
    assert steps[0] == steps[1]
    assert set(read(run / "manifest.json")["stages"]) == {"calibrate", "plan", "apply", "train", "evaluate"}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_records_its_interruption(command, environment, tmp_path, sign):
    run = tmp_path / "ended"
    status = kill_in_training(command(*STEPS, f"run.dir={run}"), environment, run, sign)
    assert status == 128 + sign
    assert (read_status(run).state, read_status(run).stage) == ("interrupted", "train")
    assert (run / "log.txt").read_text().count(f"WARNING interrupted; the same command again goes on in {run}\n") == 1
    assert "train" in read(run / "manifest.json")["stages"]


def test_a_complete_run_is_printed_again_and_not_repeated(config, capsys):
    first = execute(config())
    shown, written = capsys.readouterr().out, {p: p.stat().st_mtime_ns for p in first.rglob("*.safetensors")}
    results = (first / "results.json").stat().st_mtime_ns
    assert execute(config()) == first
    assert capsys.readouterr().out == shown
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*.safetensors")} == written
    assert (first / "results.json").stat().st_mtime_ns == results


def test_starting_over_removes_the_old_work_and_nothing_else(config):
    run = execute(config())
    (run / "checkpoints").mkdir()
    (run / "notes.txt").write_text("mine")
    execute(config("run.resume=false", "run.stages=[calibrate]"))
    left = {path.name for path in run.iterdir()} - {".lock"}
    assert left == {"config.yaml", "inputs.json", "log.txt", "manifest.json", "notes.txt", "status.json"}
    assert set(read(run / "manifest.json")["stages"]) == {"calibrate"}
    assert read_status(run).stages_done == ("calibrate",)


def test_stages_done_apart_give_the_figures_of_one_run(config, tmp_path, monkeypatch):
    whole = execute(config(f"run.dir={tmp_path / 'whole'}", task="glue/stsb"))
    for stages in ("calibrate", "plan", "train"):
        run = execute(config(f"run.dir={tmp_path / 'parts'}", f"run.stages=[{stages}]", task="glue/stsb"))
        assert not (run / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_kit.stages.fine_tuning.calibrate_for", None)
        patch.setattr("lowrank_kit.stages.fine_tuning.fit", None)
        execute(config(f"run.dir={tmp_path / 'parts'}", "run.stages=[evaluate]", task="glue/stsb"))
    ours, theirs = (read(path / "results.json") for path in (run, whole))
    assert [{**r, "value": 0, "stderr": 0} for r in ours] == [{**r, "value": 0, "stderr": 0} for r in theirs]
    assert [r["value"] for r in ours] == pytest.approx([r["value"] for r in theirs], abs=1e-4)
    facts = read(run / "manifest.json")
    assert {"model", "calibration", "trained_parameters", "data"} <= set(facts)


def test_a_look_at_an_untrained_model_does_not_outlive_its_training(config, caplog):
    run = execute(config("run.stages=[evaluate]"))
    assert "it was not trained" in caplog.text
    assert {r["checkpoint"] for r in read(run / "results.json")} == {"majority_class", "final"}
    execute(config("run.stages=[train]"))
    assert not (run / "results.json").exists()
    execute(config())
    assert {r["checkpoint"] for r in read(run / "results.json")} == {"majority_class", "early", "best", "final"}


def test_a_group_goes_on_with_its_unfinished_members(config, monkeypatch, caplog):
    words = ("task=glue", "eval.limit=8")
    calls = []
    real = glue.predict

    def fails_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return real(*arguments)

    monkeypatch.setattr(glue, "predict", fails_at_the_second)
    with pytest.raises(RuntimeError, match="power cut"):
        execute(config(*words))
    [group] = Path(config().run.root).glob("*-glue-*")
    assert read_status(group).state == "failed"
    assert read_status(group / "sst2").state == "complete"
    first = (group / "sst2/results.json").stat().st_mtime_ns
    with caplog.at_level("INFO", "lowrank_kit"):
        assert execute(config(*words)) == group
    assert "glue/stsb (2 of 4)" in caplog.text
    assert (group / "sst2/results.json").stat().st_mtime_ns == first
    names = [r["task"] for r in read(group / "results.json") if r["checkpoint"] == "final"]
    assert list(dict.fromkeys(names)) == [
        "glue/sst2",
        "glue/stsb",
        "glue/mnli:validation_matched",
        "glue/mnli:validation_mismatched",
        "glue/rte",
    ]
    assert read_status(group).state == "complete"


def test_a_directory_of_another_configuration_is_left_alone(config, tmp_path):
    run = execute(config(f"run.dir={tmp_path / 'mine'}", "run.stages=[plan]"))
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"method\.rank: 2 there, 3 now"):
        execute(config(f"run.dir={run}", "method.rank=3", "run.resume=false"))
    assert (run / "config.yaml").read_text() == before
    assert (run / "plan.json").exists()
    assert not (tmp_path / "runs").exists()
