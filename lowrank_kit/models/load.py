"""Models, tokenizers and configurations from the hub, a folder, a GGUF file or the packaged assets."""

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowrank_kit.assets import CATALOGUE, require
from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean
from lowrank_kit.models.architectures import base_type
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.quantised import Quantisation, loading_options
from lowrank_kit.models.streamed import stream
from lowrank_kit.models.weight_files import check_weight_files, weight_files
from lowrank_kit.models.whole import Head, check_whole

PACKAGED = "packaged://"
MOST_BLOCKS = 10_000
# Pivot rows of a 70B model, a number a line, would take some 50 MB; reading a file takes fifty times as much memory.
MOST_CONFIG_BYTES = 2**27
_AUTO_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "base": AutoModel,
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as the user wrote it.

    ``path``: a hub id, a checkpoint folder, a ``.gguf`` file, or ``packaged://NAME``. ``gguf_file``: the file
    to take from a folder or hub repository that holds GGUF files.
    """

    path: str
    revision: str | None = None
    gguf_file: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the module paths on top of it whose weights the checkpoint lacks, so that they start at random.

    ``left_out``: modules of the checkpoint, such as another task's head, that the model has not.
    """

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def packaged_models() -> tuple[str, ...]:
    """Return the names that may follow ``packaged://``."""
    return tuple(name for name, asset in CATALOGUE.items() if asset.kind == "model")


def local_path(source: ModelSource) -> str:
    """Return the folder or hub id that ``from_pretrained`` takes; errors as for `load_model`."""
    return _locate(source).path


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load the configuration only; errors as for `load_model`."""
    return _from_pretrained(AutoConfig, source)


def read_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer as it is; errors as for `load_model`."""
    return _from_pretrained(AutoTokenizer, source)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end-of-sequence token."""
    tokenizer = read_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: ModelSource,
    head: Head,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_labels: int | None = None,
    problem_type: str | None = None,
    quantization: Quantisation = "none",
    placement: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a model with the head asked for; a GGUF file is dequantised to ``dtype``.

    ``placement`` is what `from_pretrained` takes to spread a model (``device_map``, ``max_memory``), for inference
    alone; without it, the model is on ``device``.
    ``num_labels`` and ``problem_type`` (as in transformers) are for ``head="classification"``. A head that
    the checkpoint lacks is drawn from torch's global generator.
    Raises `ConfigError` for a path that cannot be right, `LowRankKitError` where the hub does not deliver,
    the architecture has no such head, a file of weights is damaged, or as `check_whole` for other weights than the
    model's.
    """
    check_files(source)
    config = _headed(load_config(source), head, num_labels, problem_type)
    if head == "classification" and config.get_text_config().pad_token_id is None:
        # Decoders classify at the last token that is not padding, so they must know which token pads.
        config.get_text_config().pad_token_id = load_tokenizer(source).pad_token_id
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    options |= loading_options(quantization, dtype, device) | dict(placement or {})
    if _locate(source).gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    loaded = _whole(_AUTO_CLASSES[head], source, head, **options)
    # What bitsandbytes or accelerate has put somewhere does not go elsewhere.
    stays = quantization != "none" or placement is not None
    return loaded if stays else replace(loaded, model=loaded.model.to(device))


def open_streamed(
    source: ModelSource, dtype: torch.dtype, output: Path, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal language model of which one block is on the device at a time; see `lowrank_kit.models.streamed`.

    ``output`` is the folder in which the blocks of the new checkpoint gather. Raises what `load_model` does, and
    `ConfigError` for a checkpoint that is no folder of safetensors.
    """
    folder = streamable_folder(source)
    check_files(source)
    model = skeleton(load_config(source), "causal")
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    stream(model, layout_of(model), folder, dtype, output, torch.device(device))
    return model


def streamable_folder(source: ModelSource) -> Path:
    """The checkpoint folder of a model that is streamed. Raises `ConfigError` for anything but safetensors on disk."""
    located = _locate(source)
    folder = Path(located.path)
    if not folder.is_dir():
        raise ConfigError(
            f"runtime.weights=streamed reads a folder on disk, and '{source.path}' is a hub id: fetch it first (hf "
            f"download {source.path} --local-dir FOLDER) and give model.path=FOLDER"
        )
    others = [file for file in weight_files(folder) if file.suffix != ".safetensors"] if not located.gguf_file else [""]
    if others:
        raise ConfigError(
            f"runtime.weights=streamed reads safetensors, and '{source.path}' holds its weights otherwise: save the "
            "model again with save_pretrained, or use runtime.weights=resident"
        )
    return folder


def load_like(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a whole checkpoint of ``model``'s own class, in its dtype and on its device; errors as for `load_model`."""
    source = ModelSource(str(folder))
    check_files(source)
    return _whole(type(model), source, "causal", dtype=model.dtype).model.to(model.device)


def check_files(source: ModelSource) -> None:
    """Look at a local checkpoint's files of weights; errors as for `check_weight_files`."""
    located = _locate(source)
    if located is not source and located.gguf_file is None:
        check_weight_files(Path(located.path))


def _whole(model_class: Any, source: ModelSource, head: Head, **options: Any) -> LoadedModel:
    # Shapes that do not agree are reported with all else, in place of an exception that does not name them.
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _from_pretrained(model_class, source, **reported, **options)
    on_top = check_whole(model, head, info, source.path)
    return LoadedModel(model, on_top.new, on_top.left_out)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs of a model go, be it spread over devices or not."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return model.device if hook is None else torch.device(hook.execution_device)


def skeleton(config: PretrainedConfig, head: Head, num_labels: int | None = None) -> PreTrainedModel:
    """Build the model on the meta device: every name and shape, no memory for weights.

    Raises `LowRankKitError` where the architecture has no such head, or the configuration describes no model.
    """
    config = _headed(config, head, num_labels, None)
    try:
        with torch.device("meta"):
            return _AUTO_CLASSES[head].from_config(config)
    # Every model class meets impossible settings in its own way.
    except Exception as error:
        raise LowRankKitError(
            f"the config.json of '{config.name_or_path}' describes no {config.model_type}: {_reason(error)}"
        ) from error


def _headed(config: PretrainedConfig, head: Head, num_labels: int | None, problem_type: str | None) -> PretrainedConfig:
    if type(config) not in _AUTO_CLASSES[head]._model_mapping:
        raise LowRankKitError(
            f"model type '{config.model_type}' has no {head} head in transformers{_dense_hint(config)}"
        )
    if head == "causal" and not _predicts_the_next_token(config):
        raise LowRankKitError(
            f"'{config.name_or_path}' is no causal language model: this {config.model_type} reads what comes behind a "
            "token too; choose a model that predicts the next token, or a classification task"
        )
    if (blocks := getattr(config.get_text_config(), "num_hidden_layers", 0)) > MOST_BLOCKS:
        raise LowRankKitError(
            f"the config.json of '{config.name_or_path}' describes {blocks} blocks: no model has so many"
        )
    config = deepcopy(config)
    if num_labels is not None:
        config.num_labels = num_labels
    if problem_type is not None:
        config.problem_type = problem_type
    return config


def _dense_hint(config: PretrainedConfig) -> str:
    if base_type(config.model_type) == config.model_type:
        return ""
    return (
        ": compressed checkpoints are causal language models; for another head, multiply the factors out first: "
        "python -m lowrank_kit.export FOLDER --format dense --output DENSE_FOLDER"
    )


def _predicts_the_next_token(config: PretrainedConfig) -> bool:
    """Whether no position sees a later one: not so in encoders, nor in decoders that were opened to both sides."""
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
    both_sides = getattr(config.get_text_config(), "use_bidirectional_attention", False) is True
    return not (is_encoder or both_sides or config.is_encoder_decoder)


def _locate(source: ModelSource) -> ModelSource:
    """Resolve to what from_pretrained takes: a folder or hub id, and the GGUF file in it."""
    if source.path.startswith(PACKAGED):
        name = source.path.removeprefix(PACKAGED)
        if name not in packaged_models():
            raise ConfigError(f"there is no packaged model '{name}'{did_you_mean(name, packaged_models())}")
        return ModelSource(str(require(name)))
    path = Path(source.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        wanted = source.gguf_file or "config.json"
        if not (path / wanted).is_file():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"'{source.path}' has no {wanted} (it holds {found}): give a transformers checkpoint folder, "
                f"a .gguf file, a hub id or {_packaged_hint()}"
            )
        if source.gguf_file is None and (size := (path / wanted).stat().st_size) > MOST_CONFIG_BYTES:
            raise ConfigError(
                f"the config.json of '{source.path}' has {size / 1e6:.0f} MB: what describes a model has "
                f"{MOST_CONFIG_BYTES / 1e6:.0f} at most; fetch it or write it again"
            )
        return ModelSource(str(path), gguf_file=source.gguf_file)
    if path.is_file():
        raise ConfigError(
            f"'{source.path}' is a file, and no .gguf one: give its checkpoint folder, a .gguf file, a hub id or "
            f"{_packaged_hint()}"
        )
    if source.path.startswith(("/", ".", "~")) or path.suffix == ".gguf" or source.path.count("/") > 1:
        raise ConfigError(
            f"'{source.path}' does not exist: give a folder, a .gguf file, a hub id or {_packaged_hint()}"
        )
    return source


def _from_pretrained(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    located = _locate(source)
    if located.gguf_file is not None:
        options["gguf_file"] = located.gguf_file
    try:
        return auto_class.from_pretrained(located.path, revision=located.revision or "main", **options)
    # A hostile or garbled file fails in ways that nobody lists.
    except Exception as error:
        if located is source and isinstance(error, OSError | ValueError):
            raise LowRankKitError(_hub_failure(source, error)) from error
        what = {AutoConfig: "configuration (config.json)", AutoTokenizer: "tokenizer"}.get(auto_class, "model")
        raise LowRankKitError(
            f"cannot read the {what} of '{source.path}': {_reason(error)}. Fetch it or write it again"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _hub_failure(source: ModelSource, error: BaseException) -> str:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    what_to_do = {
        "GatedRepoError": "It is gated: accept its terms on its hub page, then `hf auth login`.",
        "RevisionNotFoundError": "The repository has no such revision.",
        "RepositoryNotFoundError": "No such repository, or a private one: check the id, `hf auth login`.",
        "LocalEntryNotFoundError": "The hub cannot be reached and it is not in the local hub cache.",
    }
    kinds = [type(cause).__name__ for cause in causes]
    reason = next((text for kind, text in what_to_do.items() if kind in kinds), str(error).splitlines()[0])
    at = f" at revision '{source.revision}'" if source.revision else ""
    return (
        f"cannot load '{source.path}'{at} from the Hugging Face hub. {reason} "
        f"Without the hub: model.path = a checkpoint folder, a .gguf file or {_packaged_hint()}"
    )


def _packaged_hint() -> str:
    return " or ".join(PACKAGED + name for name in packaged_models())
