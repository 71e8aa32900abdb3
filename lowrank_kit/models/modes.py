"""A model in evaluation mode, or frozen, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_kit.deferred import nn


@contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Evaluation mode until the end; then the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def frozen(model: "nn.Module") -> Iterator[None]:
    """Evaluation mode, and no parameter wants a gradient, until the end; then everything is as it was."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
