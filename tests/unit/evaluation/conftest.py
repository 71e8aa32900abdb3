import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.compose import Composer
from lowrank_kit.config import Benchmark
from lowrank_kit.data.sources import Source, open_source
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.generation import prompts_alone
from lowrank_kit.evaluation.harness import definitions
from lowrank_kit.evaluation.sandbox import check_sandbox


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Programs can be kept apart from this machine; the test is skipped where they cannot."""
    try:
        check_sandbox()
    except LowRankKitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def benchmark() -> Callable[..., Benchmark]:
    """A benchmark as configured, in a file of its own or in a suite, with changes."""
    composer = Composer()

    def build(name: str, suite: str | None = None, **changes: Any) -> Benchmark:
        [config] = composer.jobs(["method=none", f"task={suite or f'benchmark/{name}'}"], multirun=False)
        return config.task.benchmarks[name].model_copy(update=changes)

    return build


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Wide enough that the choices' likelihoods differ.
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=2048, initializer_range=0.3, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str, str, Iterable[Mapping[str, Any]]], Source]:
    """Writes a split of a set, and returns the local source of all that was written."""

    def write(name: str, split: str, rows: Iterable[Mapping[str, Any]]) -> Source:
        _write(tmp_path / name / f"{split}.jsonl", rows)
        return open_source("local", tmp_path)

    return write


@pytest.fixture
def lm_evals_own(tmp_path: Path) -> Callable[..., Task]:
    """lm-eval's task as it is defined, but for the place of its rows, and the shots where they are given."""

    def build(name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], shots: int | None = None) -> Task:
        files = {split: str(_write(tmp_path / "own" / f"{split}.jsonl", rows)) for split, rows in splits.items()}
        manager = TaskManager(include_defaults=False, include_path=definitions()[name].parent)
        # Splits that are read but not judged on.
        for key in ("training_split", "validation_split", "fewshot_split"):
            if own := manager.task_index[name].cfg.get(key):
                files.setdefault(own, next(iter(files.values())))
        kwargs = {"data_files": files, "cache_dir": str(tmp_path / "own")}
        spec = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}
        with prompts_alone():
            spec |= {} if shots is None else {"num_fewshot": shots}
            task = manager.load([{"group": "offline", "task": [spec]}])["tasks"][name]
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return task

    return build


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
