"""Names of torch and transformers for modules that say which settings there are: both are imported at first use.

A misspelt key, `--help` and the check of a sweep need the fields of a method, not its mathematics, and importing torch
takes longer than answering them. Where torch is loaded already, its names are torch's own.
An attribute of `torch` or `nn` imports it: in annotations write ``"nn.Module"``, in quotes.
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class DeferredModule(ModuleType):
    """Stands for a module that is imported when an attribute of it is first read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING or "torch" in sys.modules:
    import torch as torch
    from torch import Tensor as Tensor
    from torch import nn as nn
else:
    torch, nn = DeferredModule("torch"), DeferredModule("torch.nn")
    # Stands in annotations alone, where jaxtyping still checks shape and number format.
    Tensor = Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig as PretrainedConfig
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
else:
    PreTrainedModel = PretrainedConfig = PreTrainedTokenizerBase = Any


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad` as a decorator that imports nothing."""

    @wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradients
