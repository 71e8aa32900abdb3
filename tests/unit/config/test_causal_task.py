import pytest

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import CausalTask, RunConfig, load
from lowrank_kit.errors import ConfigError


def check(*overrides: str) -> RunConfig:
    [config] = Composer().jobs(force_dotted(["method=none", *overrides]), multirun=False)
    return config


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (["task=perplexity"], "smollm2_135m"),
        (["task=perplexity/wikitext2"], "smollm2_135m"),
        (["task=perplexity", "model=llama2_7b"], "llama2_7b"),
        (["model=minilm_l6", "task=perplexity/c4"], "minilm_l6"),
        (["task=glue"], "minilm_l6"),
        (["task=glue/rte"], "minilm_l6"),
    ],
)
def test_texts_bring_a_causal_model_unless_one_is_named(overrides, model):
    assert check(*overrides).model.name == model


def test_the_task_holds_every_text_and_one_may_be_named_alone():
    task = check("task=perplexity").task
    assert isinstance(task, CausalTask)
    assert (task.name, list(task.texts)) == ("perplexity", ["wikitext2", "ptb", "c4", "wikipedia", "openwebtext"])
    for name, text in task.texts.items():
        alone = check(f"task=perplexity/{name}").task
        assert (alone.name, alone.texts) == (f"perplexity/{name}", {name: text})


def test_texts_of_ones_own_are_added_and_others_dropped():
    task = check("task=perplexity", "task.texts.mine={}", "task.calibrate_on=mine", "~task.texts.c4").task
    assert list(task.texts) == ["wikitext2", "ptb", "wikipedia", "openwebtext", "mine"]
    assert task.texts["mine"].eval_split == "test"
    assert check("task=perplexity/ptb", "task.texts.mine.max_rows=3").task.texts["mine"].max_rows == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.calibrate_on=wikitext", "calibrate_on='wikitext' is none of the texts; did you mean 'wikitext2'?"),
        ("task.windw=8", "task.windw is not a key; did you mean 'window'?"),
        ("task.texts.mine.eval_split=validation", "calibration_split and eval_split are both 'validation'"),
        ("task.window=1", "task.window=1 should be greater than or equal to 2"),
        ("task.texts.c4.separater=x", "task.texts.c4.separater is not a key; did you mean 'separator'?"),
        ("eval.speed.enable=true", "eval.speed.enable is not a key; did you mean 'enabled'?"),
        ("eval.speed.repeats=0", "eval.speed.repeats=0 should be greater than or equal to 1"),
    ],
)
def test_problem_is_named_with_the_nearest_legal_spelling(override, expected):
    with pytest.raises(ConfigError) as caught:
        check("task=perplexity", override)
    assert expected in str(caught.value)


def test_resolved_configuration_loads_to_an_equal_one():
    config = check("task=perplexity", "task.window=1024")
    assert load(config.resolved()).resolved() == config.resolved()
