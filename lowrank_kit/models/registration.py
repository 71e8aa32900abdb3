"""Compressed checkpoints for transformers' Auto classes: known after ``import lowrank_kit``, built when first met.

Imports nothing heavy, so that a wrong command is answered quickly. If transformers has been imported, the model
types are registered at once, else at the end of its own import of ``AutoConfig``. Only a stand-in is registered:
the model classes come into being when a ``config.json`` of their type is read.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from lowrank_kit.models.architectures import LOWRANK_PREFIX, base_type, for_each, has_experts

_WATCHED = "transformers.models.auto.configuration_auto"


def register_on_import() -> None:
    """Make the Auto classes know every ``lowrank_*`` model type, now or when transformers is imported."""
    if _WATCHED in sys.modules:
        _register(sys.modules[_WATCHED])
    else:
        sys.meta_path.insert(0, _AfterImport())


def register_with_vllm() -> None:
    """Make vLLM serve ``lowrank_*`` checkpoints by the code installed here, without any from their folders.

    It is the entry point of the group ``vllm.general_plugins``, which vLLM calls in each of its processes. Its
    Transformers backend runs them, that for mixtures of experts where the architecture has experts.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    def announce(original: str) -> None:
        # Composite models (Gemma 3 with images) have a backend of their own, and are refused by this one.
        if stock := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(original):
            backend = "TransformersMoEForCausalLM" if has_experts(original) else "TransformersForCausalLM"
            ModelRegistry.register_model(f"LowRank{stock}", f"vllm.model_executor.models.transformers:{backend}")

    for_each(announce)


class _AfterImport(MetaPathFinder):
    """Finds one module as everyone else does, and calls `_register` once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    def announce(original: str) -> None:
        model_type = f"{LOWRANK_PREFIX}{original}"
        stand_in = type(f"{model_type}_stand_in", (_StandIn, auto.PreTrainedConfig), {"model_type": model_type})
        auto.AutoConfig.register(model_type, stand_in, exist_ok=True)

    for_each(announce)


class _StandIn:
    """In the place of a configuration class until one is read: importing the stock classes now would be circular."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Register the real classes, and read with them."""
        from lowrank_kit.models.compressed import compressed_classes

        config_class, _ = compressed_classes(base_type(cls.model_type))
        return config_class.from_dict(config_dict, **kwargs)
