"""`torch` and `Tensor` for modules that say which settings there are: torch is imported at its first use.

A misspelt key, `--help` and the check of a sweep need the fields of a method, not its mathematics, and importing torch
takes longer than answering them. Where torch is loaded already, both names are torch's own.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class DeferredModule(ModuleType):
    """Stands for a module that is imported when an attribute of it is first read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING or "torch" in sys.modules:
    import torch as torch
    from torch import Tensor as Tensor
else:
    torch = DeferredModule("torch")
    # Stands in annotations alone, where jaxtyping still checks shape and number format.
    Tensor = Any
