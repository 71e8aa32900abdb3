import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lowrank_kit.pipeline import execute


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.draws
@pytest.mark.parametrize("method", ["astra", "lora"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "opt", "t5"])
def test_every_family_runs_from_rows_to_results_and_adapter(config, checkpoint, family, method):
    folder = execute(config(f"method={method}", family=family))
    found = {(r["metric"], r["checkpoint"]) for r in results(folder)}
    assert found == {("accuracy", state) for state in ("majority_class", "early", "best", "final")}
    assert {r["n"] for r in results(folder)} == {20}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["stages"]) == {"calibrate", "plan", "apply", "train", "evaluate"}
    assert len(manifest["model"]["fingerprint"]) == 32
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    assert not (folder / "checkpoints").exists()

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint(family), num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_the_model_learns_what_the_first_word_says(config):
    folder = execute(config("train.max_steps=150", "train.learning_rate=1e-2", "train.batch_size=16", task="glue/sst2"))
    looks = json.loads((folder / "history.json").read_text())
    losses = [entry["loss"] for entry in looks if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert looks[0]["step"] == 1


def test_a_regression_task_is_scored_by_correlation(config):
    folder = execute(config(task="glue/stsb"))
    final = {r["metric"]: r for r in results(folder) if r["checkpoint"] == "final"}
    assert set(final) == {"pearson", "spearman"}
    majority = [r["value"] for r in results(folder) if r["checkpoint"] == "majority_class"]
    assert majority == [0.0, 0.0]
    history = json.loads((folder / "history.json").read_text())
    # Mean squared error of scores from 0 to 5, not a cross-entropy.
    assert history[0]["loss"] > 2


def test_mnli_is_judged_on_both_of_its_splits(config):
    folder = execute(config(task="glue/mnli"))
    final = {r["task"]: r["n"] for r in results(folder) if r["checkpoint"] == "final"}
    assert final == {"glue/mnli:validation_matched": 14, "glue/mnli:validation_mismatched": 15}
    looks = {r["task"] for r in results(folder) if r["checkpoint"] in ("early", "best")}
    assert looks == {"glue/mnli:validation_matched"}


def test_rows_longer_than_the_model_are_cut(config, rows_folder, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "long/glue/rte").mkdir(parents=True, exist_ok=True)
        rows = [{"sentence1": "w1 " * 90, "sentence2": "w2 " * 90, "label": i % 2} for i in range(12)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "long/glue/rte" / f"{split}.jsonl").write_text(lines)
    for family in ("bert", "roberta", "gpt2"):
        words = (f"data.root={tmp_path / 'long'}", "method=lora")
        assert results(execute(config(*words, family=family)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_decoder_is_judged_alike_whatever_its_rows_are_padded_with(config, family):
    """One row a batch has no padding."""
    words = ("method=none", "~method.rank")
    found = [execute(config(*words, f"eval.batch_size={size}", family=family)) for size in (1, 16)]
    looks = [[(r["metric"], r["checkpoint"], r["value"]) for r in results(folder)] for folder in found]
    assert looks[0] == looks[1]


def test_without_a_method_the_model_is_judged_as_it_is(config):
    folder = execute(config("method=none", "~method.rank"))
    assert {r["checkpoint"] for r in results(folder)} == {"majority_class", "final"}
    assert not (folder / "adapter").exists()
