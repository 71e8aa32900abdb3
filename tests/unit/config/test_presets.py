"""`method.preset=paper`: what it sets, what wins over it, and what is refused."""

import pytest

from lowrank_kit.compose import Composer, by_ratio, force_dotted
from lowrank_kit.config import load, schema_for
from lowrank_kit.errors import ConfigError
from lowrank_kit.help import help_text

COMPOSER = Composer()
COMPRESSORS = ["svd", "fwsvd", "asvd", "svd_llm", "svd_llm_v2", "d_rank", "swift", "zs_svd", "kfac_svd",
               "basis_sharing", "aa_svd", "grasp", "laco", "shortgpt", "prune_comp", "replace_me", "slicegpt",
               "llm_pruner"]  # fmt: skip


def runs(*words, multirun=False):
    return COMPOSER.jobs(force_dotted(words), multirun=multirun)


def run(*words):
    [found] = runs("task=perplexity", *words)
    return found


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_published_compressor_has_the_preset():
    assert set(COMPRESSORS) <= set(COMPOSER.presets["paper"])


@pytest.mark.parametrize("method", COMPOSER.presets["paper"])
def test_a_preset_is_valid_and_shows_in_the_resolved_configuration(method):
    config = run(f"method={method}", "method.preset=paper")
    plain = config.resolved()
    assert plain["method"]["preset"] == "paper"
    assert load(plain).resolved() == plain
    # A file whose settings are all the default ones says so.
    usual = dict(flat(run(f"method={method}").resolved()))
    changed = {key for key, value in flat(plain) if key not in usual or usual[key] != value}
    text = (COMPOSER.folder / f"published/method/paper/{method}.yaml").read_text()
    assert changed != {"method.preset"} or "as by default" in " ".join(text.replace("\n#", "").split())


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("method=svd_llm", {"method.rank_multiple": 1, "calibration.samples": 256, "calibration.seq_len": 2048}),
        ("method=zs_svd method.ratio=0.2", {"method.allocation.floor": 0.0, "method.stages": 6}),
        ("method=zs_svd method.ratio=0.4", {"method.allocation.floor": 0.0}),
        ("method=zs_svd method.ratio=0.6", {"method.allocation.floor": 0.3}),
        ("method=asvd", {"method.allocation.grid": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "calibration.samples": 32}),
        ("method=d_rank", {"method.dense": False}),
        ("method=kfac_svd", {"method.truncation.gradient_shrinkage": 0.3, "method.truncation.input_shrinkage": 0.1}),
        ("method=kfac_svd", {"method.truncation.gradient_clipping": (0.1, 10.0)}),
        ("method=kfac_svd", {"method.truncation.window_margin": 0.125}),
        ("method=aa_svd", {"method.correction.passes": 25, "calibration.batch_size": 32}),
        ("method=grasp", {"method.selection": "removed", "method.propagate": True, "calibration.samples": 512}),
        ("method=replace_me", {"method.distance": "angular", "calibration.samples": 8000}),
        ("method=laco", {"method.threshold": 0.6, "method.merged": 3}),
        ("method=llm_pruner", {"calibration.samples": 10, "calibration.seq_len": 64}),
        ("method=astra", {"method.rank": 128, "train.learning_rate": 2e-5}),
        # The parts bring their own: here a rule that the method does not have by itself.
        ("method=svd_llm allocation=zs_svd method.ratio=0.6", {"method.allocation.floor": 0.3}),
        # What is typed wins, wherever it stands.
        ("method.rank_multiple=4 method=svd_llm calibration.samples=3",
         {"method.rank_multiple": 4, "calibration.samples": 3, "calibration.seq_len": 2048}),
        ("method=zs_svd allocation=uniform", {"method.allocation.kind": "uniform", "method.rank_multiple": 1}),
        ("method=svd_llm debug=fast", {"calibration.samples": 4}),
    ],
)  # fmt: skip
def test_a_preset_sets_what_is_published_and_the_command_line_wins(words, settings):
    config = run("method.preset=paper", *words.split())
    for key, expected in settings.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected, key


def test_a_preset_can_be_swept():
    jobs = runs("task=perplexity", "method=svd_llm,zs_svd", "method.preset=default,paper", multirun=True)
    assert [(job.method.name, job.method.preset, job.method.rank_multiple) for job in jobs] == [
        ("svd_llm", "default", 8), ("svd_llm", "paper", 1), ("zs_svd", "default", 8), ("zs_svd", "paper", 1),
    ]  # fmt: skip


def test_without_a_preset_a_run_keeps_its_name():
    """Run directories are found by the hash of what is written."""
    assert "preset" not in run("method=svd_llm").resolved()["method"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method=zs_svd method.preset=nope", r"method\.preset=nope is not an option; legal: default, paper"),
        ("method=zs_svd method.preset=papr", r"did you mean 'paper'"),
        ("method=loss_svd method.preset=paper", r"method=loss_svd has no preset 'paper'.*zs_svd"),
        ("method=svd_llm recovery=adapter recovery.method.preset=paper", r"preset=paper would set nothing"),
    ],
)  # fmt: skip
def test_what_is_no_preset_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        run(*words.split())


def test_a_preset_that_an_experiment_only_names_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/named.yaml").write_text("# @package _global_\nmethod:\n  preset: paper\n")
    (tmp_path / "experiment/chosen.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: svd_llm\n  - override /preset: paper\n"
        "calibration:\n  samples: 5\n"
    )
    composer = Composer(extra=tmp_path)
    with pytest.raises(ConfigError, match=r"would set nothing here: .*override /preset: paper"):
        composer.jobs(["experiment=named", "method=svd_llm"], multirun=False)
    [config] = composer.jobs(["experiment=chosen", "task=perplexity"], multirun=False)
    # An experiment's own values win over the preset that it chose.
    assert (config.method.preset, config.calibration.samples, config.calibration.seq_len) == ("paper", 5, 2048)


def test_a_method_of_ones_own_may_have_a_preset(tmp_path):
    (tmp_path / "published/method/paper").mkdir(parents=True)
    (tmp_path / "published/method/paper/loss_svd.yaml").write_text("# @package _global_\nmethod:\n  floor: 0.5\n")
    [config] = Composer(extra=tmp_path).jobs(["method=loss_svd", "task=perplexity", "preset=paper"], multirun=False)
    assert config.method.floor == 0.5


def test_help_lists_the_methods_that_have_a_preset():
    plain = dict(COMPOSER.compose(["method=zs_svd", "task=glue/rte"]))
    text = help_text(schema_for(plain), plain, COMPOSER.options, COMPOSER.presets)
    assert "method.preset (text) = default" in text
    section = text.split("Presets (method.preset=NAME)")[1].split("Keys")[0]
    assert all(name in section for name in COMPRESSORS)


def test_values_by_ratio_are_those_of_the_largest_ratio_not_above():
    values = {0.0: "low", 0.6: "high"}
    assert [by_ratio(ratio, values) for ratio in (0.2, 0.599, 0.6, 0.9)] == ["low", "low", "high", "high"]
