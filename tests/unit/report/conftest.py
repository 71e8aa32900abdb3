import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import RunConfig
from lowrank_kit.evaluation.records import EvalRecord

BASE = ("method=svd_llm", "model=smollm2_135m", "task=perplexity/wikitext2")
_composed: dict[tuple[str, ...], RunConfig] = {}


@pytest.fixture(scope="session")
def compose() -> Callable[..., RunConfig]:
    """The configuration of a command line."""
    composer = Composer()

    def build(*words: str) -> RunConfig:
        if words not in _composed:
            [_composed[words]] = composer.jobs(force_dotted(words), multirun=False)
        return _composed[words]

    return build


@pytest.fixture
def leave_run(tmp_path: Path, compose: Callable[..., RunConfig]) -> Callable[..., Path]:
    """Write a run directory as a run leaves it, without running anything."""

    def build(
        name: str,
        figures: Sequence[tuple[str, str, float]] | None,
        words: Sequence[str] = BASE,
        state: str = "complete",
        *,
        parameters: int = 100,
        dense: Sequence[tuple[str, str, float]] = (),
        n: int = 10,
        samples: dict[str, list[float]] | None = None,
        error: str | None = None,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(compose(*words).resolved()))
        now: dict[str, Any] = {"pid": os.getpid(), "hostname": "elsewhere", "started": time.time()}
        now |= {"process_started": psutil.Process().create_time(), "updated": time.time()}
        status = {"state": state, "stage": None, "stages_done": [], "error": error, **now}
        (folder / "status.json").write_text(json.dumps(status))
        sizes = {"dense": {"parameters": 200, "bytes": 800}, "compressed": {"parameters": parameters, "bytes": 400}}
        manifest = {"size": sizes, "versions": {"torch": "2"}, "git": {"revision": "c0ffee" * 7, "dirty": True}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        states = (("dense", dense), ("final", figures or ()))
        records = [
            asdict(EvalRecord(task, metric, value, None, n, 0, f"local: {task}", {}, state))
            for state, found in states
            for task, metric, value in found
        ]
        if figures is not None:
            (folder / "results.json").write_text(json.dumps(records))
        for task, right in (samples or {}).items():
            file = folder / "samples/final" / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"task": task, "row_hash": str(i), "prompt_hash": "p", "acc": r} for i, r in enumerate(right)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return build
