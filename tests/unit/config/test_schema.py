from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import ClassificationTask, RunConfig, TaskGroup, load
from lowrank_kit.errors import ConfigError

BASE = ["method=fake", "run.method_prefixes=[third_party_methods]", "task=glue/rte"]


@pytest.fixture
def check(third_party: Path) -> Any:
    composer = Composer(extra=third_party)
    return lambda *overrides: load(composer.compose(force_dotted([*BASE, *overrides])))


def test_defaults_are_valid_and_typed(check):
    config = check()
    assert isinstance(config, RunConfig)
    assert isinstance(config.task, ClassificationTask)
    assert type(config.method).__name__ == "Fake"
    assert config.run.stages == ("calibrate", "plan", "apply", "train", "evaluate")


def test_group_lists_the_eight_tasks_in_order(check):
    task = check("task=glue").task
    assert isinstance(task, TaskGroup)
    assert list(task.members) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    assert task.members["mnli"].eval_splits == ("validation_matched", "validation_mismatched")
    assert task.members["stsb"].labels == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.rnk=3", "method.rnk is not a key; did you mean 'rank'?"),
        ("method.subspace=tial", "method.subspace='tial' is not legal; did you mean 'tail'?"),
        ("method.rank=0", "method.rank=0 should be greater than or equal to 1"),
        ("method.rank=8.0", "method.rank=8.0 should be a valid integer"),
        ("method.path=x", "method.path is not a key; did you mean 'model.path'?"),
        ("train.samples=3", "train.samples is not a key; did you mean 'calibration.samples'?"),
        ("train.learning_rat=1", "train.learning_rat is not a key; did you mean 'learning_rate'?"),
        ("train.learning_rate=-1", "train.learning_rate=-1 should be greater than 0"),
        ("train.warmup_ratio=1.5", "train.warmup_ratio=1.5 should be less than or equal to 1"),
        ("calibration.samples=0", "calibration.samples=0 should be greater than or equal to 1"),
        ("calibration.cache=1", "calibration.cache=1 should be a valid boolean"),
        ("run.stages=[trian]", "run.stages.0='trian' is not legal; did you mean 'train'?"),
        ("data=local", "add data.root=FOLDER"),
        ("device=gpu", "device='gpu' is not a device"),
        ("device=cuda1", "did you mean 'cuda"),
        ("dtype=bf16", "dtype='bf16' is not legal; did you mean 'bfloat16'?"),
        ("seed=-1", "seed=-1 should be greater than or equal to 0"),
        ("task.metrics=[pearson]", "metrics ['pearson'] do not fit labels=2"),
        ("task.labls=2", "task.labls is not a key; did you mean 'labels'?"),
        ("data.root=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("~method._target_", "method._target_ is missing"),
    ],
)
def test_problem_is_named_with_the_nearest_legal_spelling(check, override, expected):
    with pytest.raises(ConfigError) as caught:
        check(override)
    assert expected in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.keep=1", "'method.allocation.keep'?"),
        ("method.blocks=[1]", "'method.allocation.keep.blocks'?"),
        ("method.anchor=1", "'method.correction.anchor'?; method.correction="),
        ("method.probe_windows=2", "'method.allocation.probe_windows'?; method.allocation=asvd and "),
        ("method.truncation.ratio=0.2", "'method.ratio'?"),
    ],
)
def test_a_key_of_another_section_is_told_its_place(check, override, expected):
    with pytest.raises(ConfigError) as caught:
        check("method=svd_llm", "task=perplexity", override)
    assert f"{override.split('=')[0]} is not a key; did you mean {expected}" in str(caught.value)


def test_a_key_of_another_choice_is_told_who_has_it(check):
    with pytest.raises(ConfigError, match=r"probe_windows is not a key; method\.allocation=asvd and .* have it"):
        check("method=svd_llm", "task=perplexity", "method.allocation.probe_windows=2")


def test_every_problem_is_listed_at_once(check):
    with pytest.raises(ConfigError) as caught:
        check("method.rnk=3", "train.batch_size=0", "eval.limt=3", "task=glue", "task.members.cola.labls=2")
    keys = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
    assert sorted(keys) == ["eval.limt", "method.rnk", "task.members.cola.labls", "train.batch_size=0"]


def test_a_bad_item_of_a_list_is_reported_once(check):
    with pytest.raises(ConfigError) as caught:
        check("run.stages=[trian]")
    assert len(str(caught.value).splitlines()) == 2


def test_open_dictionaries_take_new_keys(check):
    assert check("method.rank_pattern.q=16").method.rank_pattern == {"q": 16}


def test_a_method_outside_the_allowed_packages_says_how_to_allow_it(check):
    with pytest.raises(ConfigError, match=r"run\.method_prefixes=\[mylab,third_party_methods\]"):
        check("run.method_prefixes=[mylab]")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("third_party_methods.Fak", "did you mean 'Fake'"),
        ("third_party_methods.Literal", "not a method"),
        ("third_party_methods.deep.Fake", "cannot be imported"),
        ("third_party_methods_evil.Fake", "not in an allowed package"),
    ],
)
def test_wrong_target(check, target, expected):
    with pytest.raises(ConfigError, match=expected):
        check(f"method._target_={target}")


def test_resolved_configuration_loads_to_an_equal_one(check):
    config = check("method.rank=3", "train.learning_rate=1e-5", "task=glue", "tracker=wandb")
    again = load(config.resolved())
    assert again.resolved() == config.resolved()
    assert again.resolved()["method"]["_target_"] == "third_party_methods.Fake"


def test_configuration_is_immutable(check):
    with pytest.raises(ValueError, match="frozen"):
        check().seed = 3
