"""The model classes of compressed checkpoints: a stock class of transformers whose named linears are factored."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models import portable
from lowrank_kit.models.architectures import base_type

Classes = tuple[type[PretrainedConfig], type[PreTrainedModel]]


def stock_classes(model_type: str) -> Classes:
    """Return transformers' own configuration and causal language model class of a model type.

    Raises `LowRankKitError` for a type without a causal language model.
    """
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LowRankKitError(f"model type '{model_type}' has no causal language model in transformers")
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


@cache
def compressed_classes(model_type: str) -> Classes:
    """Return the classes of a compressed ``model_type`` and register them; errors of `stock_classes`."""
    config_class, model_class = portable.derive_classes(*stock_classes(model_type), mixin=_WithCode)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


class _WithCode(portable.LowRankModel):
    """Leaves the code of its classes beside the weights, for ``trust_remote_code`` where we are absent."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save as transformers does, with the modelling file."""
        original = base_type(self.config.model_type)
        config_class, model_class = compressed_classes(original)
        module = f"modeling_{self.config.model_type}"
        self.config.auto_map = {
            "AutoConfig": f"{module}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
        }
        super().save_pretrained(save_directory, **options)
        Path(save_directory, f"{module}.py").write_text(_code(original), "utf-8")


def _code(model_type: str) -> str:
    stock = ", ".join(f"transformers.{found.__name__}" for found in stock_classes(model_type))
    names = ", ".join(found.__name__ for found in compressed_classes(model_type))
    source = (
        Path(portable.__file__).read_text("utf-8").replace("import torch\n", "import torch\nimport transformers\n", 1)
    )
    return f"{source}\n\n{names} = derive_classes({stock})\n"
