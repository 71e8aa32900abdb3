import shlex

import pytest

from lowrank_kit.report.command import command_of
from lowrank_kit.report.find import find_runs
from lowrank_kit.retrace import overrides_of
from lowrank_kit.runs.directory import identity

LINES = [
    ("method=svd_llm", "method.ratio=0.35", "model=smollm2_135m", "task=perplexity/wikitext2", "eval.speed.repeats=3"),
    ("method=d_rank", "task=perplexity", "task.texts.mine={}", "~task.texts.c4", "data=local", "data.root=/some where"),
    ("method=grasp", "method.blocks=[1,3]", "task=commonsense7", "recovery=factors", "device=cpu"),
    ("method=astra", "task=glue/rte", "method.rank_pattern.query=4", "method.seed=7", "train.max_steps=null"),
    ("method=astra_released", "task=glue", "~task.members.cola", "model.name=mine", "model.path='it is b\\'s'"),
    ("method=lora", "task=glue/sst2", "task.text_columns=[a b,c]", "train.learning_rate=1e-05"),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0].removeprefix("method="))
def test_the_command_composes_the_same_configuration(compose, line):
    config = compose(*line, "seed=3", "run.root=elsewhere")
    overrides = overrides_of(config.resolved())
    shell = shlex.split(shlex.join(overrides))
    again = compose(*shell, "seed=3")
    assert identity(again) == identity(config)
    # What the YAML files say already is not repeated.
    assert len(overrides) <= len(line) + 5
    assert not any("elsewhere" in word for word in overrides)


def test_seeds_make_a_sweep(leave_run):
    [run], _ = find_runs([leave_run("one", [("wikitext2", "perplexity", 20.0)])])
    assert command_of(run, [0]).startswith("python -m lowrank_kit.run method=svd_llm")
    assert command_of(run, [0, 1]).startswith("python -m lowrank_kit.run -m method=svd_llm")
    assert command_of(run, [0, 1]).endswith(" seed=0,1")


def test_what_cannot_be_composed_is_given_as_it_was_typed(leave_run):
    folder = leave_run("one", [("wikitext2", "perplexity", 20.0)])
    text = (folder / "config.yaml").read_text().replace("lowrank_kit.compressors.svd.", "gone.methods.")
    (folder / "config.yaml").write_text(text)
    (folder / "manifest.json").write_text('{"command": ["mine.py", "a b"]}')
    [run], _ = find_runs([folder])
    assert command_of(run, [0]).startswith("mine.py 'a b'  # as typed: method._target_='gone.methods.")
