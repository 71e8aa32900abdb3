"""What a run was made from, by content: rows and weights belong to a run's identity as its configuration does."""

from collections.abc import Iterator, Mapping
from typing import Any

Inputs = dict[str, dict[str, str]]
"""SHA-256 by name: of every split under ``rows``, of every file of the model under ``model``."""

INPUTS_FILE = "inputs.json"


def inputs_of(facts: Mapping[str, Mapping[str, Any]], model: Mapping[str, str]) -> Inputs:
    """Return the inputs of a run from what its data say of their splits and from the `contents` of its model."""
    return {"rows": {split: str(fact["sha256"]) for split, fact in facts.items()}, "model": dict(model)}


def changes(earlier: Mapping[str, Mapping[str, str]], now: Inputs) -> Iterator[str]:
    """Say what is not as it was: ``rows of mine:test``, ``model.safetensors of the model``."""
    for kind, found in now.items():
        known = earlier.get(kind, {})
        for name in dict.fromkeys([*known, *found]):
            if known.get(name) != found.get(name):
                what = f"rows of {name}" if kind == "rows" else f"{name} of the model"
                yield f"{what}{'' if name in found else ' (gone)'}{'' if name in known else ' (new)'}"
