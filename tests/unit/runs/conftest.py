import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.config import RunConfig, load

METHOD = """
from lowrank_kit.config import Method

class Tiny(Method):
    name: str = "tiny"
    rank: int = 4
"""
PLAIN: dict[str, Any] = {
    "method": {"_target_": "tiny_methods.Tiny", "rank": 4},
    "model": {"name": "minilm_l6", "path": "packaged://minilm_l6"},
    "task": {
        "kind": "classification",
        "name": "glue/rte",
        "hub_path": "nyu-mll/glue",
        "text_columns": ["sentence1", "sentence2"],
        "labels": 2,
        "metrics": ["accuracy"],
        "eval_splits": ["validation"],
    },
    "data": {"source": "packaged"},
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunConfig]]:
    """Build a configuration whose runs live in the test's folder."""
    (tmp_path / "tiny_methods.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)

    def build(rank: int = 4, seed: int = 0, **run: Any) -> RunConfig:
        settings = {"root": str(tmp_path / "runs"), "method_prefixes": ["tiny_methods"], **run}
        method = {**PLAIN["method"], "rank": rank}
        return load({**PLAIN, "method": method, "seed": seed, "run": settings})

    yield build
    sys.modules.pop("tiny_methods", None)
