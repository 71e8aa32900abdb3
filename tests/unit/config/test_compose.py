from pathlib import Path

import pytest

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import schema_for
from lowrank_kit.errors import ConfigError
from lowrank_kit.help import help_text

BASE = ["method=fake", "++run.method_prefixes=[third_party_methods]"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=astar", "method=astar is not an option; did you mean 'astra'?"),
        ("task=glue/rtee", "task=glue/rtee is not an option; did you mean 'glue/rte'?"),
        ("methd=lora", "methd is not a key; did you mean 'method'?"),
        ("sed=3", "sed is not a key; did you mean 'seed'?"),
        ("method.rank=[1", "'method.rank=[1' cannot be read"),
        ("method.rank=1,2", "add -m"),
        ("~method.rnk", "'method.rnk' does not exist"),
        ("train=3", "train=3 is not an option; legal: default, recovery"),
        ("method=null", "method=null is not an option; legal: aa_svd, "),
        ("calibration=5", "calibration=5 is not an option; legal: paper, small, standard"),
    ],
)
def test_hydras_errors_are_put_in_our_words(override, expected):
    with pytest.raises(ConfigError) as caught:
        Composer().jobs(force_dotted([override]), multirun=False)
    assert expected in str(caught.value)
    assert "++" not in str(caught.value)


def test_what_hydra_is_started_with_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config-name nope is not in .*; legal: config"):
        Composer("nope").compose()
    for folder in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(ConfigError, match=r"--config-dir '.*' is not a folder"):
            Composer(extra=folder)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.path=meta-llama/Llama-3.2-1B"], "Llama-3.2-1B"),
        (["model.path=runs/hisvd-x-s0/checkpoint"], "hisvd-x-s0"),
        (["model.path=/weights/tiny.Q4.gguf"], "tiny.Q4"),
        (["model.path=meta-llama/Llama-3.2-1B", "model.name=mine"], "mine"),
        (["model=llama2_7b", "model.path=/weights/llama"], "llama2_7b"),
        ([], "smollm2_135m"),
    ],
)
def test_a_model_given_by_its_path_alone_is_named_after_it(overrides, name):
    words = force_dotted(["method=none", "task=perplexity", *overrides])
    assert [job.model.name for job in Composer().jobs(words, multirun=False)] == [name]


def test_a_sweep_is_expanded_in_full(third_party: Path):
    jobs = Composer(extra=third_party).jobs([*BASE, "++method.rank=1,2", "seed=range(3)"], multirun=True)
    assert [(job.method.rank, job.seed) for job in jobs] == [(r, s) for r in (1, 2) for s in range(3)]


def test_one_bad_combination_stops_the_sweep_and_is_named(third_party: Path):
    with pytest.raises(ConfigError) as caught:
        Composer(extra=third_party).jobs([*BASE, "++method.rank=4,0", "seed=0,1,2"], multirun=True)
    assert "method.rank=0 should be greater" in str(caught.value)
    assert "in 3 of 6 jobs, the first: method=fake" in str(caught.value)


def test_an_experiment_may_bring_its_own_sweep(third_party: Path):
    folder = third_party / "experiment"
    folder.mkdir()
    (folder / "two_seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 3,4\n"
    )
    jobs = Composer(extra=third_party).jobs([*BASE, "experiment=two_seeds"], multirun=False)
    assert [job.seed for job in jobs] == [3, 4]


def test_only_plain_dotted_overrides_are_forced():
    words = [
        "a.b=1",
        "method=x",
        "+a.b=1",
        "~a.b",
        "++a.b=1",
        "hydra.verbose=true",
        "a/b@c.d=e",
        "a.b.c=x.y=z",
    ]
    assert [w for w, f in zip(words, force_dotted(words), strict=True) if w != f] == ["a.b=1", "a.b.c=x.y=z"]


def test_help_names_every_key_and_option(third_party: Path):
    composer = Composer(extra=third_party)
    plain = dict(composer.compose([*BASE, "task=glue/rte"]))
    text = help_text(schema_for(plain), plain, composer.options, composer.presets)
    for key in (
        "method.rank (integer >= 1) = 8",
        "train.max_steps (integer >= 1 or null)",
        "seed (integer >= 0",
    ):
        assert key in text
    assert "Directions kept." in text
    assert "glue/mnli" in text
    assert all(len(line) <= 120 for line in text.splitlines())
