"""Finding the classes of a package: every module of it is imported, so that they register themselves."""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module that lies in a package."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
