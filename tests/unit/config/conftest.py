import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

METHODS = '''
from typing import Literal
from pydantic import Field
from lowrank_kit.config import Method

class Fake(Method):
    name: str = "fake"
    """Name in tables."""
    rank: int = Field(default=8, ge=1)
    """Directions kept."""
    subspace: Literal["tail", "top"] = "tail"
    """Which directions."""
    rank_pattern: dict[str, int] = {}
    """Rank by role."""
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package outside ours with a method, and a folder of YAMLs that names it."""
    (tmp_path / "third_party_methods.py").write_text(METHODS)
    group = tmp_path / "conf" / "method"
    group.mkdir(parents=True)
    (group / "fake.yaml").write_text(
        "_target_: third_party_methods.Fake\nname: fake\nrank: 8\nsubspace: tail\nrank_pattern: {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "conf"
    sys.modules.pop("third_party_methods", None)
