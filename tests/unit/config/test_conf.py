from pathlib import Path

import pytest
import yaml
from pydantic_core import to_jsonable_python

from lowrank_kit.allocations.allocation import Allocation
from lowrank_kit.compose import Composer
from lowrank_kit.config import RunConfig, load
from lowrank_kit.corrections.correction import Correction
from lowrank_kit.errors import ConfigError
from lowrank_kit.storages.storage import Storage
from lowrank_kit.structures.structure import Structure
from lowrank_kit.truncations.truncation import Truncation

COMPOSER = Composer()
# What a search needs is tested where one is made (test_sweep.py).
GROUPS = COMPOSER.options.keys() - {"hydra/sweeper"}
CHOICES = [f"{group}={name}" for group in sorted(GROUPS) for name in COMPOSER.options[group]]


# Options that cannot stand alone: the user has to say where the rows are, and these are parts of some methods.
LOCAL = (
    "data=local", "experiment=astra_math_small", "experiment=astra_code_small", "experiment=peft_metamath_small",
)  # fmt: skip
NEEDED = {
    **{name: ["++data.root=rows"] for name in LOCAL},
    **{part: ["method=svd"] for part in ("allocation", "truncation", "correction", "storage", "structure")},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_is_valid(choice):
    needed = NEEDED.get(choice) or NEEDED.get(choice.partition("=")[0], [])
    # Launchers and sweepers are for sweeps.
    assert COMPOSER.jobs([choice, *needed], multirun=choice.startswith("hydra/"))


PAPERS = {"astra_math": "meta-llama/Llama-2-7b-hf", "astra_code": "meta-llama/Llama-2-7b-hf",
          "astra_commonsense": "meta-llama/Meta-Llama-3-8B"}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_experiment_has_its_settings_and_a_rival_is_one_word_away(name):
    for method in ("astra", "lora"):
        [run] = COMPOSER.jobs([f"experiment={name}", f"method={method}"], multirun=False)
        train, adapter = run.train, run.method
        assert run.model.path == PAPERS[name]
        assert (adapter.name, adapter.rank, adapter.alpha, adapter.roles) == (method, 128, 128, None)
        assert (train.learning_rate, train.scheduler, train.warmup_ratio, train.epochs) == (2e-5, "cosine", 0.03, 1)
        assert train.batch_size * train.gradient_accumulation == 128
        assert (run.calibration.samples, run.calibration.seq_len) == (64 if "commonsense" in name else 256, 512)
        assert (run.task.max_length, run.dtype, train.train_samples) == (512, "bfloat16", 100_000)


def test_pefts_comparison_has_its_settings():
    [run] = COMPOSER.jobs(["experiment=peft_metamath", "method=corda"], multirun=False)
    train, adapter, learnt = run.train, run.method, run.task.instructions["metamath"]
    assert run.model.path == "meta-llama/Llama-3.2-3B"
    assert (adapter.name, adapter.rank, adapter.alpha, adapter.roles) == ("corda", 32, 64, ("q", "v"))
    assert (train.max_steps, train.batch_size, train.learning_rate, train.weight_decay) == (5000, 4, 1e-4, 0.1)
    assert (train.scheduler, train.warmup_ratio, train.max_grad_norm) == ("cosine", 0.1, 1)
    assert (run.task.max_length, learnt.max_characters, learnt.learn_prompt) == (768, 1300, True)


@pytest.mark.parametrize("words", [["recovery=adapter"], ["recovery=adapter", "method@recovery.method=astra"]])
def test_the_adapter_of_a_recovery_is_typed_and_comes_back_from_its_configuration(words):
    [run] = COMPOSER.jobs(["method=svd_llm", "task=commonsense", *words], multirun=False)
    assert run.recovery.method.name == ("astra" if len(words) > 1 else "lora")
    assert load(run.resolved()).resolved() == run.resolved()
    with pytest.raises(ConfigError, match=r"recovery\.method\.rnk is not a key; did you mean 'rank'"):
        COMPOSER.jobs(["method=svd_llm", "task=commonsense", *words, "++recovery.method.rnk=2"], multirun=False)


def test_what_says_nothing_is_not_in_a_configuration():
    """Run directories are found by the hash of it."""
    [run] = COMPOSER.jobs(["method=svd_llm", "task=perplexity"], multirun=False)
    plain = run.resolved()
    assert not {"instructions", "max_length"} & set(plain["task"])
    assert "method" not in plain["recovery"]
    assert "effects" not in plain["eval"]
    assert "storage" not in plain["method"]
    usual = {"hub_path", "hub_name", "split", "instruction_column", "input_column", "output_columns", "label_column"}
    assert set(plain["recovery"]["sets"]["alpaca"]) == usual


@pytest.mark.parametrize("method", ["astra", "lora", "none"])
def test_a_part_that_the_method_does_not_have_is_refused_with_those_that_have_it(method):
    with pytest.raises(ConfigError, match=r"allocation= .* method=.*svd_llm"):
        COMPOSER.jobs([f"method={method}", "allocation=hisvd"], multirun=False)


PARTS = {
    "truncation": Truncation,
    "allocation": Allocation,
    "correction": Correction,
    "storage": Storage,
    "structure": Structure,
}
SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items() if name not in ("method", "task")}


def class_of(group, config):
    """The class whose fields are the keys of a group's YAMLs."""
    if group == "method":
        return type(config.method)
    if group in PARTS:
        return type(getattr(config.method, group))
    return SECTIONS[group]


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.partition("=")[0] in {"method", *PARTS, *SECTIONS}])
def test_a_yaml_repeats_no_default_of_the_class(choice):
    group, _, name = choice.partition("=")
    needed = NEEDED.get(choice) or NEEDED.get(group, [])
    [config] = COMPOSER.jobs([choice, *needed], multirun=False)
    found = class_of(group, config)
    raw = yaml.safe_load((COMPOSER.folder / group / f"{name}.yaml").read_text()) or {}
    # A name says which one it is; defaults are Hydra's.
    for key in set(raw) - {"_target_", "defaults", "name", "kind", "source"}:
        default = to_jsonable_python(found.model_fields[key].get_default(call_default_factory=True), fallback=repr)
        assert raw[key] != default, f"{key}: {raw[key]} is the default"


def test_every_option_is_found_by_hydra_too():
    published = COMPOSER.folder / "published"
    files = {p for p in COMPOSER.folder.glob("*/**/*.yaml") if published not in p.parents}
    assert sum(map(len, COMPOSER.options.values())) == len(files)
    assert Path(COMPOSER.folder, "config.yaml").is_file()
