"""Parts of our own for lowrank_kit: each registers itself when it is imported, and the entry point imports this."""

from mylab import by_depth, drop_last, minor, rounded, shrunk, stablelm

__all__ = ["by_depth", "drop_last", "minor", "rounded", "shrunk", "stablelm"]
