"""No method: the model as it is, evaluated."""

from lowrank_kit.methods.base import Method


class Baseline(Method):
    """Change nothing and train nothing."""
