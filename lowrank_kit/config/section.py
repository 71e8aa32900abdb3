"""What every part of the configuration is made of."""

from collections.abc import Mapping
from inspect import get_annotations
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from lowrank_kit.errors import LowRankKitError

Bos = Literal["auto", "always", "never"]
"""Whether BOS begins a text: as the model's own tokenizer does it, or in any case, or not at all."""


class Section(BaseModel):
    """One part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # At first use: by then every class that a `Choice` may be is there, those of plug-ins too.
        defer_build=True,
    )


class Choice(Section):
    """A part of which there are several classes; `kind` says which one.

    A direct subclass is what a field is annotated with: `Truncation`, `Allocation`. A subclass of that one that says
    its `kind` registers itself under it when its module is imported, be it ours or another package's.
    """

    known: ClassVar[dict[str, type["Choice"]]] = {}
    """The classes to choose from, by `kind`; every direct subclass has its own."""
    default: ClassVar[str | None] = None
    """Of a direct subclass: the kind that settings without one are of; `method.storage.bits=[4]` says enough."""

    kind: str
    """Which one."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Register a class under its `kind`. Raises `LowRankKitError` where another class has it."""
        super().__pydantic_init_subclass__(**options)
        if Choice in cls.__bases__:
            cls.known = {}
            return
        kind = cls.model_fields["kind"].default
        if "kind" not in get_annotations(cls) or not isinstance(kind, str):
            return
        other = cls.known.setdefault(kind, cls)
        if _place(other) != _place(cls):
            raise LowRankKitError(f"{_place(cls)} has the kind '{kind}' of {_place(other)}: give it a kind of its own")
        cls.known[kind] = cls
        _forget_schemas(Section)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Of a direct subclass: any of the classes known by now."""
        if Choice not in cls.__bases__:
            return handler(source)
        return core_schema.tagged_union_schema(
            {kind: handler.generate_schema(known) for kind, known in sorted(cls.known.items())}, cls._kind_of
        )

    @classmethod
    def _kind_of(cls, value: Any) -> Any:
        return value.get("kind", cls.default) if isinstance(value, Mapping) else getattr(value, "kind", None)


def _place(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _forget_schemas(section: type[Section]) -> None:
    """Let every class that has been built already, perhaps with fewer choices, be built again."""
    for known in section.__subclasses__():
        _forget_schemas(known)
        if known.__pydantic_complete__:
            known.model_rebuild(force=True)
