import json

import pytest
import torch
import warm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.errors import ConfigError
from lowrank_kit.export import checkpoint_in
from lowrank_kit.pipeline import execute

# A language that can be learnt: every word is followed by the next one.
TEXT = " ".join(f"w{i % 60}" for i in range(1200))


@pytest.fixture(scope="session")
def learnable_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("learnable")
    (root / "mine").mkdir()
    for split in ("validation", "test"):
        (root / "mine" / f"{split}.txt").write_text(TEXT)
    rows = [{"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i + 2} w{i + 3}"} for i in range(40)]
    (root / "alpaca").mkdir()
    (root / "alpaca/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def words(language_arguments, sharp_checkpoint, learnable_folder):
    def build(*more, method="svd_llm", recovery="factors"):
        usual = [
            *(f"recovery={recovery}", "recovery.max_length=40", "recovery.data=text", "method.ratio=0.4"),
            *("calibration.samples=16", "train.max_steps=20", "train.batch_size=4", "train.learning_rate=1e-2"),
        ]
        return language_arguments(*usual, *more, method=method, path=sharp_checkpoint, data=learnable_folder)

    return build


def read(file):
    return json.loads(file.read_text())


def figures(run):
    return {r["checkpoint"]: r["value"] for r in read(run / "results.json")}


@pytest.mark.parametrize("method", ["svd_llm", "basis_sharing"])
@pytest.mark.parametrize("recovery", ["factors", "lora"])
def test_recovery_makes_the_perplexity_fall_and_the_model_no_larger(method, recovery, job):
    run = execute(job(method=method, recovery=recovery))
    found = figures(run)
    assert set(found) == {"dense", "compressed", "final"}
    assert found["final"] < 0.8 * found["compressed"]
    before, after = (load_file(run / name / "model.safetensors") for name in ("checkpoint", "recovered"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    losses = [entry["loss"] for entry in read(run / "history.json") if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not (run / "checkpoints").exists()


def test_distillation_brings_the_model_back_towards_the_original(job):
    run = execute(job("recovery.loss=distill"))
    losses = [entry["loss"] for entry in read(run / "history.json") if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_instructions_are_learnt(job):
    run = execute(job("recovery.data=alpaca", "train.max_steps=30"))
    losses = [entry["loss"] for entry in read(run / "history.json") if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert read(run / "manifest.json")["data"]["alpaca:train"]["rows"] == 40
    assert read(run / "manifest.json")["trained_parameters"] > 0


def test_a_fresh_process_finds_the_judged_model_in_the_recovered_checkpoint(job, environment):
    run = execute(job("dtype=bfloat16"))
    assert checkpoint_in(run) == run / "recovered"
    script = """
import sys, torch, lowrank_kit
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])["input_ids"])
windows = ids[: len(ids) // 32 * 32].view(-1, 32)
with torch.no_grad():
    losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
print(model.dtype, float(torch.stack(losses).mean().exp()))
"""
    done = warm.run(["-c", script, str(run / "recovered"), TEXT], environment, check=True)
    dtype, value = done.stdout.split()
    assert dtype == "torch.bfloat16"
    assert float(value) == pytest.approx(figures(run)["final"], rel=1e-2)


@pytest.mark.parametrize("recovery", [("factors", "recovery.loss=distill"), ("lora", "recovery.loss=next_token")])
def test_a_killed_recovery_goes_on_and_ends_bit_for_bit_the_same(
    job, words, kill_in_training, tmp_path, recovery, caplog
):
    what, loss = recovery
    steps = (loss, "train.max_steps=40", "train.save_every=5", "eval.limit=4")
    whole = execute(job(*steps, f"run.dir={tmp_path / 'whole'}", recovery=what))
    run = tmp_path / "killed"
    again = (*steps, f"run.dir={run}")
    kill_in_training(words(*again, recovery=what), run)
    assert not (run / "recovered").exists()
    with caplog.at_level("INFO", "lowrank_kit"):
        execute(job(*again, recovery=what))
    assert "training goes on from step " in caplog.text
    ours, theirs = (load_file(path / "recovered/model.safetensors") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert read(run / "results.json") == read(whole / "results.json")


def test_stages_apart_start_from_the_compressed_checkpoint(job, tmp_path, caplog):
    whole = execute(job())
    parts = tmp_path / "parts"
    execute(job(f"run.dir={parts}", "run.stages=[calibrate,plan,apply,evaluate]"))
    assert "it was not recovered" in caplog.text
    assert figures(parts)["final"] == figures(whole)["compressed"]
    execute(job(f"run.dir={parts}", "run.stages=[train]"))
    assert not (parts / "results.json").exists()
    execute(job(f"run.dir={parts}"))
    assert figures(parts) == figures(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["recovery.data=piqa"], r"recovery\.data=piqa: .*sets here: alpaca, mine.*recovery\.data=text"),
        (["recovery.data=alpaca", "recovery.sets.alpaca.output_columns=[outputs]"], "did you mean 'output'"),
        (["recovery.data=alpaca", "recovery.max_length=100000"], r"recovery\.max_length=100000 is longer than"),
        (["recovery.data=alpaca", "recovery.max_length=20"], r"all 40 rows of alpaca fill recovery\.max_length=20"),
        (["calibration.samples=5000"], r"calibration\.samples=5000"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_before_the_model_is_loaded(settings, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        execute(job(*settings))


def test_a_model_that_was_not_compressed_has_nothing_to_recover(job, words, tmp_path):
    none = [w for w in words(method="none") if not w.startswith("method.")]
    [config] = Composer().jobs(force_dotted(none), multirun=False)
    with pytest.raises(ConfigError, match=r"recovery\.what=factors .* method=none compresses nothing"):
        execute(config)
    assert not (tmp_path / "runs").exists()


def test_a_model_without_factors_says_to_use_lora(job):
    with pytest.raises(ConfigError, match="recovery=lora"):
        execute(job("method.ratio=0.34", method="shortgpt"))
    run = execute(job("method.ratio=0.34", method="shortgpt", recovery="lora"))
    assert figures(run)["final"] < figures(run)["compressed"]
    assert AutoModelForCausalLM.from_pretrained(run / "recovered").dtype == torch.float32
