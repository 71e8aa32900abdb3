"""What the stages of every kind of task share. What a stage needs of earlier ones is made, or read back, when asked."""

import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowrank_kit import __version__
from lowrank_kit.assets import cache_dir
from lowrank_kit.config import RunConfig, Stage
from lowrank_kit.method import Method
from lowrank_kit.models.architectures import find
from lowrank_kit.models.load import ModelSource, load_config, load_tokenizer
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest, peak_rss_bytes
from lowrank_kit.runs.tracking import Tracker

VERSIONS = {"lowrank_kit": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}


@runtime_checkable
class TaskData(Protocol):
    """The rows or texts of a task."""

    def facts(self) -> dict[str, Any]:
        """Source, note, hash and size of every split, for the manifest."""
        ...


Task = TypeVar("Task")
Data = TypeVar("Data", bound=TaskData)


class Stages(Generic[Task, Data]):
    """One task's run. Every public method is a stage; its outcome is on disk when it returns."""

    shared: ClassVar[frozenset[Stage]] = frozenset({"calibrate", "train", "evaluate"})
    """The stages that several processes do together; the others are for the first one alone."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        data: Data,
        device: str,
        run: RunDirectory,
        manifest: Manifest,
        tracker: Tracker,
    ) -> None:
        assert isinstance(config.method, Method)
        self.config, self.task, self.method, self.device = config, task, config.method, device
        self._data, self._run, self._manifest, self._tracker = data, run, manifest, tracker
        self._model_source = ModelSource(config.model.path, config.model.revision, config.model.gguf_file)

    def calibrate(self) -> None:
        """Collect the statistics that the method needs, if any; they go to the content-keyed cache."""
        raise NotImplementedError

    def plan(self) -> None:
        """Decide the rank of every matrix: ``plan.json``."""
        raise NotImplementedError

    def apply(self) -> None:
        """Change the model."""
        raise NotImplementedError

    def train(self) -> None:
        """Train what the method left trainable."""
        raise NotImplementedError

    def evaluate(self) -> None:
        """Measure the final model: ``results.json``."""
        raise NotImplementedError

    def _note(self, what: str, started: float) -> None:
        """Keep in the manifest what a part of an adapter's start took; the peak is the process's until then."""
        figures = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        if torch.cuda.is_available():
            figures["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self._manifest.record("initialisation", self._initialisation | {what: figures})

    @property
    def _initialisation(self) -> dict[str, Any]:
        return self._manifest.as_dict().get("initialisation", {})

    @property
    def _cache(self) -> Path | None:
        return cache_dir() / "calibration" if self.config.calibration.cache else None

    @cached_property
    def _model_config(self) -> PretrainedConfig:
        """The configuration as the model came."""
        return load_config(self._model_source)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self._model_source)


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, whose ``model_max_length`` is no more than what the model has positions for."""
    tokenizer, config = load_tokenizer(source), load_config(source)
    if positions := getattr(config.get_text_config(), "max_position_embeddings", None):
        architecture = find(config.model_type)
        behind_padding = architecture is not None and architecture.positions_start == "behind_padding"
        first = config.pad_token_id + 1 if behind_padding else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - first)
    return tokenizer
