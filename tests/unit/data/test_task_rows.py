import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowrank_kit.config import CalibrationConfig, ClassificationTask, EvalConfig
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import open_source
from lowrank_kit.data.task_rows import TaskRows
from lowrank_kit.errors import ConfigError

TASK = {
    "kind": "classification",
    "name": "mine/pairs",
    "hub_path": "mine/pairs",
    "text_columns": ["left", "right"],
    "labels": 2,
    "metrics": ["accuracy"],
    "eval_splits": ["validation"],
}


def reader(separates: bool, limit: int | None = None) -> Reader:
    """Row number n is the word n, token n + 10; CLS 1, SEP 2, the line break 3."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "\n": 3, "x": 4} | {str(i): i + 10 for i in range(200)}
    made = Tokenizer(models.WordLevel(words, unk_token="x"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if separates:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    names = ["input_ids", "token_type_ids", "attention_mask"][:: 1 if separates else 2]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_input_names=names)
    return Reader(fast, limit=limit)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    folder = tmp_path / "mine/pairs"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(100)), ("validation", range(100, 130))):
        lines = (json.dumps({"left": f"{i} x x", "right": "x", "label": i % 2}) for i in numbers)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))

    def build(seed: int = 0, task: dict | None = None, train_samples=None, eval=None, calibration=None) -> TaskRows:
        whole = ClassificationTask.model_validate({**TASK, **(task or {})}, strict=False)
        settings = EvalConfig(**(eval or {})), CalibrationConfig(**(calibration or {}))
        return TaskRows(whole, open_source("local", tmp_path), *settings, seed=seed, train_samples=train_samples)

    build.folder = folder
    return build


def numbers(encoded) -> list[int]:
    return [ids[1] - 10 for ids in encoded["input_ids"]]


ENCODER = reader(separates=True)


def test_held_out_rows_are_the_same_for_every_seed_and_never_learned_or_calibrated(rows):
    made = [rows(seed, eval={"held_out": 30}, calibration={"samples": 100}) for seed in (0, 1)]
    held = [sorted(numbers(r.evaluation(ENCODER)[0].rows)) for r in made]
    assert held[0] == held[1]
    assert len(set(held[0])) == 30
    for r in made:
        assert set(numbers(r.train(ENCODER))) == set(range(100)) - set(held[0])
        assert not set(numbers(r.calibration(ENCODER))) & set(held[0])
    assert numbers(made[0].train(ENCODER)) != numbers(made[1].train(ENCODER))
    assert made[0].evaluation(ENCODER)[0].source.startswith("held out of training; local: ")
    assert set(made[0].facts()) == {"train"}


def test_calibration_takes_rows_that_are_trained_on(rows):
    made = rows(3, train_samples=20, calibration={"samples": 8, "seq_len": 5})
    assert len(made.train(ENCODER)) == 20
    assert numbers(made.calibration(ENCODER)) == numbers(made.train(ENCODER))[:8]
    assert max(map(len, made.calibration(ENCODER)["input_ids"])) == 5
    assert len(rows(train_samples=1000).train(ENCODER)) == 100


def test_evaluation_takes_the_first_rows_up_to_the_limit(rows):
    [evaluated] = rows(eval={"limit": 7}).evaluation(ENCODER)
    assert (evaluated.name, numbers(evaluated.rows)) == ("mine/pairs", list(range(100, 107)))
    assert len(rows(eval={"limit": 1000}).evaluation(ENCODER)[0].rows) == 30


def test_the_facts_name_every_split_with_its_hash(rows):
    facts = rows().facts()
    assert {name: fact["rows"] for name, fact in facts.items()} == {"train": 100, "validation": 30}
    assert len({fact["sha256"] for fact in facts.values()}) == 2
    assert facts["train"]["source"] == "local: mine/pairs/train.jsonl"


def test_pairs_are_joined_by_the_separator_where_there_is_one(rows):
    [first] = rows(eval={"limit": 1}).evaluation(ENCODER)
    assert first.rows[0] == {
        "input_ids": [1, 110, 4, 4, 2, 4, 2],
        "token_type_ids": [0, 0, 0, 0, 0, 1, 1],
        "labels": 0,
    }
    [first] = rows(eval={"limit": 1}).evaluation(reader(separates=False))
    assert first.rows[0]["input_ids"] == [110, 4, 4, 3, 4]


def test_long_rows_are_cut_to_the_models_length(rows):
    [first, *_] = rows().train(reader(separates=True, limit=5))["input_ids"]
    assert first == [1, numbers(rows().train(ENCODER))[0] + 10, 2, 4, 2]


def test_regression_labels_are_floats(rows):
    made = rows(task={"labels": 1, "metrics": ["pearson"]})
    assert all(isinstance(label, float) for label in made.train(ENCODER)["labels"])
    assert set(made.train_labels) == {0.0, 1.0}


@pytest.mark.parametrize("label", [2, -1, None, "1", 0.5])
def test_a_label_that_is_no_class_is_refused(rows, label):
    (rows.folder / "validation.jsonl").write_text(json.dumps({"left": "1", "right": "x", "label": label}))
    with pytest.raises(ConfigError, match=r"of 'validation' are not classes 0 to 1"):
        rows()


def test_an_empty_split_is_refused(rows):
    (rows.folder / "validation.jsonl").write_text("")
    with pytest.raises(ConfigError, match="'validation' has no rows"):
        rows()


def test_holding_out_everything_is_refused(rows):
    assert len(rows(eval={"held_out": 99}).train(ENCODER)) == 1
    with pytest.raises(ConfigError, match=r"eval\.held_out=100 leaves nothing"):
        rows(eval={"held_out": 100})
