"""The models of a run, opened in `with` blocks: the original, and what stages have left."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from lowrank_kit.config import ModelConfig
from lowrank_kit.data.reader import Reader
from lowrank_kit.models.architectures import find
from lowrank_kit.models.load import LoadedModel, ModelSource, load_config, load_model, load_tokenizer, open_streamed


class Opened:
    """A model of a `with` block, read when it is first asked for: the stage that needs it is charged for it."""

    def __init__(self, read: Callable[[], LoadedModel]) -> None:
        self._read = read
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, with what of it is new."""
        if self._loaded is None:
            self._loaded = self._read()
        return self._loaded

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.loaded.model

    def close(self) -> None:
        """Let the model go."""
        self._loaded = None
        # Adapters make circles of references.
        gc.collect()


@contextmanager
def loaded(read: Callable[[], LoadedModel]) -> Iterator[Opened]:
    """Open what ``read`` reads for a `with` block; behind it the model is let go."""
    opened = Opened(read)
    try:
        yield opened
    finally:
        opened.close()


@dataclass(frozen=True)
class Models:
    """How the models of a run are read: number format, device, seed; ``placement`` spreads one that is evaluated."""

    settings: ModelConfig
    dtype: torch.dtype
    device: str
    seed: int
    placement: Mapping[str, Any] | None = None

    @property
    def source(self) -> ModelSource:
        """Where the original is."""
        return source_of(self.settings)

    @cached_property
    def configuration(self) -> PretrainedConfig:
        """The original's, as it came."""
        return load_config(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original's."""
        return tokenizer_of(self.source)

    @cached_property
    def reader(self) -> Reader:
        """The original, as its data see it."""
        return Reader(self.tokenizer, self.configuration, self.settings.name, self.settings.max_length)

    def causal(self, *, spread: bool = False) -> LoadedModel:
        """Read the original as a causal language model."""
        set_seed(self.seed)
        placement = self.placement if spread else None
        quantization = self.settings.quantization
        return load_model(
            self.source, "causal", self.dtype, self.device, quantization=quantization, placement=placement
        )

    def streamed(self, output: Path) -> LoadedModel:
        """Open the original as a causal model of one block at a time, whose changed blocks gather in ``output``."""
        set_seed(self.seed)
        return LoadedModel(open_streamed(self.source, self.dtype, output, self.device), ())

    def classifier(self, labels: int) -> LoadedModel:
        """Read the original as a classifier; 1 label is a regression."""
        set_seed(self.seed)
        problem = "regression" if labels == 1 else "single_label_classification"
        quantization = self.settings.quantization
        return load_model(
            self.source, "classification", self.dtype, self.device, labels, problem, quantization=quantization
        )

    def saved(self, folder: Path, dtype: torch.dtype | None = None, *, spread: bool = False) -> LoadedModel:
        """Read a causal language model that a stage has left; ``dtype`` None: the run's."""
        placement = self.placement if spread else None
        return load_model(ModelSource(str(folder)), "causal", dtype or self.dtype, self.device, placement=placement)


def source_of(settings: ModelConfig) -> ModelSource:
    """Where the configuration says that the model is."""
    return ModelSource(settings.path, settings.revision, settings.gguf_file)


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, whose ``model_max_length`` is no more than what the model has positions for."""
    tokenizer, config = load_tokenizer(source), load_config(source)
    if positions := getattr(config.get_text_config(), "max_position_embeddings", None):
        architecture = find(config.model_type)
        behind_padding = architecture is not None and architecture.positions_start == "behind_padding"
        first = config.pad_token_id + 1 if behind_padding else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - first)
    return tokenizer
