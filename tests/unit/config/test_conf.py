from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lowrank_kit.compose import Composer
from lowrank_kit.config import RunConfig, load

COMPOSER = Composer()
CHOICES = [f"{group}={name}" for group, names in COMPOSER.options.items() for name in names]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_is_valid(choice):
    # The only option that cannot stand alone: the user has to say where the rows are.
    needed = ["data.root=rows"] if choice == "data=local" else []
    assert COMPOSER.jobs([choice, *needed], multirun=False)


def test_every_key_of_the_schema_is_written_in_the_yamls():
    plain = OmegaConf.to_container(COMPOSER.compose(["task=glue/rte"]))
    for name, field in RunConfig.model_fields.items():
        written = plain[name]
        if name not in ("method", "task") and isinstance(written, dict):
            assert set(written) == set(field.annotation.model_fields), name


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("method=")])
def test_every_key_of_a_method_is_written_in_its_yaml(choice):
    config = COMPOSER.compose([choice])
    written = set(config.method) - {"_target_"}
    assert written == set(type(load(config).method).model_fields)


def test_every_option_is_found_by_hydra_too():
    files = {p for p in COMPOSER.folder.rglob("*.yaml") if p.parent != COMPOSER.folder}
    assert len(CHOICES) == len(files)
    assert Path(COMPOSER.folder, "config.yaml").is_file()
