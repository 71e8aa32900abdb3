"""Another forward pass in a module's place, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lowrank_kit.deferred import nn


@contextmanager
def forward_replaced(module: "nn.Module", forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of ``module`` run ``forward``; its hooks stay at work."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        # Where accelerate spreads a model, the instance has a forward of its own.
        if own is None:
            del module.forward
        else:
            module.forward = own
