"""What a run does with checkpoints that are not whole, not the task's, or bring a trained head."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute

SST2 = {"task": "glue/sst2"}


@pytest.fixture
def classifier(tiny_model, checkpoint, tmp_path):
    """A folder with a classifier of these classes whose answers are far apart."""

    def build(*names, family="bert", **config):
        folder = tmp_path / "classifier"
        model = tiny_model(family, "classification", num_labels=len(names) or 2, initializer_range=0.5, **config)
        if names:
            model.config.id2label = dict(enumerate(names))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(checkpoint(family)).save_pretrained(folder)
        return folder

    return build


def answers(folder, rows):
    """The class names that the checkpoint gives to sentences, by transformers alone, one at a time."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        best = [int(model(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax()) for row in rows]
    return [model.config.id2label[i] for i in best]


def read(folder, name):
    return json.loads((folder / name).read_text())


def accuracy(run):
    return {r["checkpoint"]: r["value"] for r in read(run, "results.json") if r["metric"] == "accuracy"}["final"]


@pytest.mark.parametrize("names", [("negative", "positive"), ("POSITIVE", "NEGATIVE"), (), ("LABEL_1", "LABEL_0")])
def test_a_trained_head_is_judged_by_the_names_of_its_classes(config, classifier, rows_folder, names):
    folder = classifier(*names)
    rows = [json.loads(line) for line in (rows_folder / "glue/sst2/validation.jsonl").read_text().splitlines()]
    classes = {"negative": 0, "positive": 1, "label_0": 0, "label_1": 1}
    expected = [classes[name.lower()] == row["label"] for name, row in zip(answers(folder, rows), rows, strict=True)]
    assert 0 < sum(expected) < len(rows)
    run = execute(config("method=none", "~method.rank", f"model.path={folder}", **SST2))
    assert accuracy(run) == pytest.approx(sum(expected) / len(rows))
    assert read(run, "manifest.json")["model"]["new_modules"] == []


@pytest.mark.parametrize("method", [["method=lora"], ["method=full_ft", "~method.rank"]])
def test_training_does_not_turn_the_classes_round(config, classifier, rows_folder, method):
    """A step too small to change an answer: what is saved answers as the checkpoint did, under the same names."""
    folder = classifier("positive", "negative")
    rows = [json.loads(line) for line in (rows_folder / "glue/sst2/validation.jsonl").read_text().splitlines()]
    expected = [
        {"negative": 0, "positive": 1}[name] == row["label"]
        for name, row in zip(answers(folder, rows), rows, strict=True)
    ]
    few = ["train.learning_rate=1e-9", "train.head_learning_rate=1.0"]
    run = execute(config(*method, *few, f"model.path={folder}", **SST2))
    assert accuracy(run) == pytest.approx(sum(expected) / len(rows))
    looks = [entry["eval_accuracy"] for entry in read(run, "history.json") if "eval_accuracy" in entry]
    assert looks == pytest.approx([sum(expected) / len(rows)] * len(looks))
    if method[0] == "method=full_ft":
        assert answers(run / "checkpoint", rows) == answers(folder, rows)


def test_the_loss_of_a_turned_head_is_that_of_its_names(config, classifier):
    losses = []
    for names in (("negative", "positive"), ("positive", "negative")):
        folder = classifier(*names)
        file = folder / "model.safetensors"
        weights = load_file(file)
        if names[0] == "positive":
            weights |= {f"classifier.{part}": weights[f"classifier.{part}"].flip(0) for part in ("weight", "bias")}
        save_file(weights, file, {"format": "pt"})
        run = execute(config("method=lora", f"run.dir={folder.parent / names[0]}", f"model.path={folder}", **SST2))
        losses.append([entry["loss"] for entry in read(run, "history.json") if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_new_head_is_said_in_the_record_and_named_after_the_classes(config, caplog):
    caplog.set_level(logging.INFO, "lowrank_kit")
    run = execute(config("method=full_ft", "~method.rank", **SST2))
    model = read(run, "manifest.json")["model"]
    assert model["new_modules"]
    assert any("starts at random, to be trained" in message for message in caplog.messages)
    assert read(run / "checkpoint", "config.json")["id2label"] == {"0": "negative", "1": "positive"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b", "c"), r"the head of '.*' has 3 classes \(a, b, c\), and glue/sst2 needs 2"),
        (("spam", "ham"), r"classes of '.*' \(spam, ham\) are not those of glue/sst2 \(negative, positive\)"),
    ],
)
def test_another_tasks_head_is_refused_before_anything_is_made(config, classifier, tmp_path, names, message):
    with pytest.raises(ConfigError, match=message):
        execute(config(f"model.path={classifier(*names)}", **SST2))
    assert not (tmp_path / "runs").exists()


def test_damaged_and_absent_weights_are_found_before_anything_is_made(config, classifier, tmp_path):
    folder = classifier()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for message in ("is damaged or was not written to its end", "has no weights"):
        with pytest.raises(LowRankKitError, match=message):
            execute(config(f"model.path={folder}", **SST2))
        file.unlink(missing_ok=True)
        assert not (tmp_path / "runs").exists()


def test_an_encoder_is_refused_by_causal_tasks(composed, language_arguments, checkpoint, tmp_path):
    for method in ("none", "svd_llm"):
        with pytest.raises(ConfigError, match="is no causal language model: this bert reads what comes behind a token"):
            execute(composed(language_arguments(method=method, path=checkpoint("bert"))))
    assert not (tmp_path / "runs").exists()


def test_float16_on_a_cpu_is_remarked_upon(composed, language_arguments, checkpoint, caplog):
    execute(composed(language_arguments("dtype=float16", "task.max_windows=1", method="none")))
    assert any("dtype=float16 on a CPU" in message for message in caplog.messages)
