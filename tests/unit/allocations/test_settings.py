from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from lowrank_kit.allocations import AnyAllocation

CONF = Path(__file__).parents[3] / "conf" / "allocation"
RULES = {rule().kind: rule for rule in get_args(get_args(AnyAllocation)[0])}


def test_every_rule_has_its_yaml_and_every_yaml_its_rule():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(RULES)


@pytest.mark.parametrize("kind", RULES)
def test_a_yaml_lists_every_field_with_its_default(kind):
    text = (CONF / f"{kind}.yaml").read_text()
    assert text.startswith("# @package method.allocation\n")
    assert yaml.safe_load(text) == RULES[kind]().model_dump(mode="json")


@pytest.mark.parametrize("kind", RULES)
def test_kind_selects_the_rule(kind):
    assert type(TypeAdapter(AnyAllocation).validate_python({"kind": kind})) is RULES[kind]


@pytest.mark.parametrize(
    "wrong", [{"kind": "hisvd", "eta": 0}, {"kind": "d_rank", "moved": 1}, {"kind": "asvd", "grid": ()}, {"kind": "x"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(AnyAllocation).validate_python(wrong)
