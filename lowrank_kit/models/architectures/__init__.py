"""The architectures that are understood, a file a family; each registers itself when it is imported.

The only place with names of families and roles. A package of one's own adds a family by `register`.
"""

from importlib import import_module
from pkgutil import iter_modules

from lowrank_kit.models.architectures.architecture import (
    LOWRANK_PREFIX,
    Architecture,
    Experts,
    Group,
    Joining,
    Kind,
    OneOf,
    Product,
    Role,
    Stack,
    all_with,
    architecture_of,
    base_type,
    find,
    for_each,
    has_experts,
    register,
    registered,
)

__all__ = [
    "LOWRANK_PREFIX",
    "Architecture",
    "Experts",
    "Group",
    "Joining",
    "Kind",
    "OneOf",
    "Product",
    "Role",
    "Stack",
    "all_with",
    "architecture_of",
    "base_type",
    "find",
    "for_each",
    "has_experts",
    "register",
    "registered",
]

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
