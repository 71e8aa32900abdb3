"""What the configuration of a compressed checkpoint says of its model, checked before anything is built."""

from typing import Any

FORMAT = 2
"""Of these entries. In format 1, which had no number, names began at the whole model and not at its base model."""


def checked(lowrank: Any) -> dict[str, Any]:
    """The entries of ``config.lowrank``, all there. Raises `ValueError`, with the entry, for what cannot be right."""
    entries = lowrank if isinstance(lowrank, dict) else {}
    found = {
        "format": entries.get("format", 1),
        "ranks": entries.get("ranks"),
        "shared_down": entries.get("shared_down"),
        "pivot_rows": entries.get("pivot_rows", {}),
        "rounded": entries.get("rounded", {}),
        "shapes": entries.get("shapes", {}),
        "shortcuts": entries.get("shortcuts", []),
        "experts": entries.get("experts", []),
    }
    if not _is_size(found["format"]) or found["format"] > FORMAT:
        raise ValueError(
            f"lowrank.format is {found['format']!r}, and this code reads formats up to {FORMAT}: the checkpoint was "
            "written by a newer lowrank_kit. Upgrade it, or load with trust_remote_code=True where it is not installed"
        )
    kinds: dict[str, Any] = {
        "ranks": _is_size,
        "shared_down": lambda owner: isinstance(owner, str),
        "pivot_rows": _is_count,
        "rounded": lambda form: isinstance(form, list | tuple) and [*form[:-1]] in ([4], [8]) and _is_count(form[-1]),
        "shapes": lambda shape: isinstance(shape, list | tuple) and len(shape) == 2 and all(map(_is_size, shape)),
    }
    for entry, is_right in kinds.items():
        if not isinstance(found[entry], dict):
            raise ValueError(f"lowrank.{entry} is {found[entry]!r}: it must say something of every layer by its name")
        for name, value in found[entry].items():
            if not is_right(value):
                raise ValueError(f"lowrank.{entry}: {value!r} cannot be right for {name!r}")
    for entry in ("shortcuts", "experts"):
        if not isinstance(found[entry], list) or not all(isinstance(name, str) for name in found[entry]):
            raise ValueError(f"lowrank.{entry} is {found[entry]!r}: it must be a list of layers")
    return found


def relative(entries: dict[str, Any], base: str) -> dict[str, Any]:
    """The entries with names relative to the base model; in format 1 they begin with its name, ``base``."""
    if entries["format"] > 1:
        return entries
    prefix, found = f"{base}.", dict(entries)
    for entry in ("ranks", "shared_down", "pivot_rows", "shapes"):
        found[entry] = {name.removeprefix(prefix): value for name, value in entries[entry].items()}
    found["shared_down"] = {name: owner.removeprefix(prefix) for name, owner in found["shared_down"].items()}
    for entry in ("shortcuts", "experts"):
        found[entry] = [name.removeprefix(prefix) for name in entries[entry]]
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0
