"""The folder of an adapter, as PEFT writes it: whole, or refused with the file and what is wrong in it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_json
from lowrank_kit.models.weight_files import REMEDY, check_tensors, damage

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CHECKED = (CONFIG, *WEIGHTS)
"""What `check_adapter` reads."""


def check_adapter(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's weights, by PEFT's names, and look at them all.

    Raises `LowRankKitError` for a file that is missing or damaged, a weight that is not finite, and for factors of LoRA
    that are not those of its configuration.
    """
    config_file = folder / CONFIG
    read_json(config_file, dict, REMEDY)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    # Settings of a wrong kind fail in ways that nobody lists.
    except Exception as error:
        raise LowRankKitError(damage(config_file, error)) from error
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise LowRankKitError(f"'{folder}' has no weights of its adapter: neither {' nor '.join(WEIGHTS)}")
    check_tensors(file)
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    if bad := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        raise LowRankKitError(
            f"'{file}' holds numbers that are not finite, first in {bad[0]}: train it again with a lower learning rate"
        )
    if isinstance(config, LoraConfig):
        _check_factors(file, config, weights)
    return weights


def load_adapter(base_model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put an adapter into ``base_model``, which is changed; raises `LowRankKitError` of `check_adapter`, and for one
    that does not fit the model."""
    weights = check_adapter(folder)
    try:
        loaded = PeftModel.from_pretrained(base_model, str(folder))
    # Of a target that is not there, a shape that is another one, and a head that the file lacks.
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        if isinstance(error, KeyError):
            reason = f"its file lacks {reason}"
        raise LowRankKitError(f"the adapter in '{folder}' does not fit this {_kind(base_model)}: {reason}") from error
    if absent := sorted(set(get_peft_model_state_dict(loaded, save_embedding_layers=False)) - set(weights)):
        raise LowRankKitError(
            f"the adapter in '{folder}' lacks {len(absent)} weights for this {_kind(base_model)}: {', '.join(absent)}; "
            "export or fetch it again"
        )
    return loaded


def _kind(model: PreTrainedModel) -> str:
    return type(model).__name__


def _check_factors(file: Path, config: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    if not isinstance(config.target_modules, set | list | str):
        raise LowRankKitError(_unlike(file, f"targets that are no names, {config.target_modules!r}"))
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {name.removesuffix(end) for name in weights for end in ends if name.endswith(end)}
    wanted = config.target_modules if isinstance(config.target_modules, set | list) else ()
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise LowRankKitError(_unlike(file, f"nothing of {target}, which adapter_config.json names"))
    for name in sorted(names):
        down, up = (weights.get(f"{name}{end}") for end in ends)
        if down is None or up is None:
            raise LowRankKitError(_unlike(file, f"one of the two factors of {name} alone"))
        module = name.removeprefix("base_model.model.")
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
        if (down.shape[0], up.shape[1]) != (rank, rank):
            shapes = f"{list(up.shape)} times {list(down.shape)}"
            raise LowRankKitError(_unlike(file, f"{shapes} for {module}, whose rank is {rank} by adapter_config.json"))


def _unlike(file: Path, what: str) -> str:
    return f"'{file}' has {what}: they are not of one adapter; export or fetch it again"
