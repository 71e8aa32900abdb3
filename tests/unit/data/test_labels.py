"""Outputs of a trained head and the classes of a task, told apart by name."""

from itertools import permutations

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig

from lowrank_kit.config import ClassificationTask
from lowrank_kit.data.labels import check_labels, label_order, name_classes
from lowrank_kit.errors import ConfigError

NAMES = ("entailment", "not_neutral", "contra diction")


def task(labels=3, names=NAMES):
    return ClassificationTask(
        kind="classification",
        name="own/task",
        hub_path="nobody/task",
        text_columns=("text",),
        labels=labels,
        label_names=names,
        metrics=("accuracy",) if labels > 1 else ("pearson",),
        eval_splits=("test",),
    )


def config(*names):
    return BertConfig(id2label=dict(enumerate(names)), architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
@pytest.mark.parametrize("style", ["{}", "LABEL_{}", "names", "NAMES", "na-mes"])
def test_every_order_of_the_names_gives_the_answers_of_the_names(order, style):
    spelt = {"names": NAMES, "NAMES": [name.upper() for name in NAMES], "na-mes": [n.replace("_", "-") for n in NAMES]}
    theirs = [spelt[style][i] if style in spelt else style.format(i) for i in order]
    found = label_order(config(*theirs), task())
    # Rows whose best output is the model's class k, that is the task's class order[k].
    logits = np.eye(3, dtype=np.float32)
    assert found.logits(logits).argmax(1).tolist() == list(order)
    rows = datasets.Dataset.from_dict({"labels": list(order)})
    assert found.for_model(rows)["labels"][:] == [0, 1, 2]
    assert found.for_task(np.arange(3)).tolist() == list(order)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (("a", "b", "c"), r"classes of '' \(a, b, c\) are not those of own/task \(entailment, not_neutral, contra"),
        (("entailment", "not_neutral", "neutral"), "are not those of own/task"),
        (("entailment", "entailment", "not_neutral"), "are not those of own/task"),
        (("LABEL_0", "LABEL_1", "LABEL_3"), "are not those of own/task"),
        (("entailment", "not_neutral"), r"has 2 classes \(entailment, not_neutral\), and own/task needs 3"),
    ],
)
def test_other_classes_are_refused(theirs, message):
    with pytest.raises(ConfigError, match=message):
        check_labels(config(*theirs), task())


def test_names_that_the_task_does_not_tell_are_asked_for():
    with pytest.raises(ConfigError, match=r"set task\.label_names=\[\.\.\.\]"):
        check_labels(config("good", "bad", "ugly"), task(names=()))
    assert label_order(config("LABEL_1", "LABEL_0"), task(2, ())).outputs == (1, 0)


def test_a_checkpoint_without_a_head_is_not_asked():
    plain = BertConfig(id2label={0: "x"}, architectures=["BertForMaskedLM"])
    check_labels(plain, task())
    name_classes(plain, task())
    assert label_order(plain, task()).outputs == (0, 1, 2)
    assert plain.num_labels == 3


def test_one_number_has_no_names():
    one = config("LABEL_0")
    values = torch.randn(4, 1).numpy()
    assert label_order(one, task(1, ())).logits(values) is not None
    np.testing.assert_array_equal(label_order(one, task(1, ())).logits(values), values)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a", "b"), ("a", "b", "c", "d")])
def test_every_class_has_a_name_of_its_own(names):
    with pytest.raises(ValueError, match="give 3 different ones, or none"):
        task(names=names)
