"""The model classes of compressed checkpoints: stock classes of transformers whose named linears are factored."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import share
from lowrank_kit.models import portable
from lowrank_kit.models.architectures import base_type

Classes = tuple[type[PretrainedConfig], type[PreTrainedModel]]

_HEADS: dict[str, tuple[Any, Any]] = {
    "AutoModel": (AutoModel, MODEL_MAPPING),
    "AutoModelForCausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "AutoModelForSequenceClassification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
}


def stock_classes(model_type: str) -> Classes:
    """Return transformers' own configuration and causal language model class of a model type.

    Raises `LowRankKitError` for a type without a causal language model.
    """
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LowRankKitError(f"model type '{model_type}' has no causal language model in transformers")
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


def compressed_classes(model_type: str) -> Classes:
    """Return the configuration and causal language model class of a compressed ``model_type``, registered.

    Errors of `stock_classes`.
    """
    config_class, models = _classes(model_type)
    return config_class, models["AutoModelForCausalLM"]


@cache
def _classes(model_type: str) -> tuple[type[PretrainedConfig], dict[str, type[PreTrainedModel]]]:
    """The configuration's class, and the models' by the names of the Auto classes; all are registered with these."""
    stock = _stock_models(model_type)
    config_class, *derived = portable.derive_classes(CONFIG_MAPPING[model_type], *stock.values(), mixin=_WithCode)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    models = dict(zip(stock, derived, strict=True))
    for name, model_class in models.items():
        _HEADS[name][0].register(config_class, model_class, exist_ok=True)
    return config_class, models


def _stock_models(model_type: str) -> dict[str, type[PreTrainedModel]]:
    config_class, _ = stock_classes(model_type)
    return {name: mapping[config_class] for name, (_, mapping) in _HEADS.items() if config_class in mapping}


class _WithCode(portable.LowRankModel):
    """Leaves the code of its classes beside the weights, for ``trust_remote_code`` where we are absent."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save as transformers does, with the modelling file."""
        original = base_type(self.config.model_type)
        config_class, models = _classes(original)
        module = f"modeling_{self.config.model_type}"
        # The configuration before the models: vLLM takes them in this order.
        self.config.auto_map = {
            "AutoConfig": f"{module}.{config_class.__name__}",
            **{name: f"{module}.{model_class.__name__}" for name, model_class in models.items()},
        }
        super().save_pretrained(save_directory, **options)
        share(*Path(save_directory).glob("*.safetensors"))
        Path(save_directory, f"{module}.py").write_text(_code(original), "utf-8")


def _code(model_type: str) -> str:
    config_class, models = _classes(model_type)
    stock = [CONFIG_MAPPING[model_type], *_stock_models(model_type).values()]
    names = ", ".join(found.__name__ for found in (config_class, *models.values()))
    arguments = ", ".join(f"transformers.{found.__name__}" for found in stock)
    return f"{portable.source()}\n\n{names} = derive_classes(\n    {arguments}\n)\n"
