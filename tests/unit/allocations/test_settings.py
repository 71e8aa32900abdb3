from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from lowrank_kit.allocations.allocation import Allocation

CONF = Path(__file__).parents[3] / "conf" / "allocation"
RULES = {rule().kind: rule for rule in Allocation.known.values()}


def test_every_rule_has_its_yaml_and_every_yaml_its_rule():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(RULES)


@pytest.mark.parametrize("kind", RULES)
def test_kind_selects_the_rule(kind):
    assert type(TypeAdapter(Allocation).validate_python({"kind": kind})) is RULES[kind]


@pytest.mark.parametrize(
    "wrong", [{"kind": "hisvd", "eta": 0}, {"kind": "d_rank", "moved": 1}, {"kind": "asvd", "grid": ()}, {"kind": "x"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(Allocation).validate_python(wrong)
