from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lowrank_kit.compose import Composer
from lowrank_kit.config import RunConfig, load
from lowrank_kit.errors import ConfigError

COMPOSER = Composer()
CHOICES = [f"{group}={name}" for group, names in COMPOSER.options.items() for name in names]


# Options that cannot stand alone: the user has to say where the rows are, and these are parts of some methods.
NEEDED = {"data=local": ["data.root=rows"], "allocation": ["method=svd"], "truncation": ["method=svd"]}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_is_valid(choice):
    needed = NEEDED.get(choice) or NEEDED.get(choice.partition("=")[0], [])
    assert COMPOSER.jobs([choice, *needed], multirun=False)


@pytest.mark.parametrize("method", ["astra", "lora", "none"])
def test_a_part_that_the_method_does_not_have_is_refused_with_those_that_have_it(method):
    with pytest.raises(ConfigError, match=r"allocation= .* method=.*svd_llm"):
        COMPOSER.jobs([f"method={method}", "allocation=hisvd"], multirun=False)


def test_every_key_of_the_schema_is_written_in_the_yamls():
    plain = OmegaConf.to_container(COMPOSER.compose(["task=glue/rte"]))
    for name, field in RunConfig.model_fields.items():
        written = plain[name]
        if name not in ("method", "task") and isinstance(written, dict):
            assert set(written) == set(field.annotation.model_fields), name


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("method=")])
def test_every_key_of_a_method_is_written_in_its_yaml(choice):
    config = COMPOSER.compose([choice])
    method = load(config).method
    written = set(config.method) - {"_target_"}
    assert written == set(type(method).model_fields)
    for part in ("truncation", "allocation"):
        if isinstance(config.method.get(part), DictConfig):
            assert set(config.method[part]) == set(type(getattr(method, part)).model_fields)


def test_every_option_is_found_by_hydra_too():
    files = {p for p in COMPOSER.folder.rglob("*.yaml") if p.parent != COMPOSER.folder}
    assert len(CHOICES) == len(files)
    assert Path(COMPOSER.folder, "config.yaml").is_file()
