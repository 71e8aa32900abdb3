"""Adapt and compress language models with low-rank methods, on shared spectral primitives."""

__version__ = "0.1.0"
