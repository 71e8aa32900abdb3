"""Whether a checkpoint holds what its model needs and nothing else; what may be missing is a head that is trained."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.architectures import registered

log = logging.getLogger(__name__)

Head = Literal["causal", "classification", "seq2seq", "base"]


@dataclass(frozen=True)
class OnTop:
    """``new``: module paths that the checkpoint lacks; ``left_out``: modules that it has and the model has not."""

    new: tuple[str, ...]
    left_out: tuple[str, ...]


def check_whole(model: PreTrainedModel, head: Head, info: Mapping[str, Any], path: str) -> OnTop:
    """Compare what was wanted with what was read, and say it where a head is new or left out.

    Args:
        model: as loaded.
        head: what was asked for. Only a classifier's head may be new, whole, with the pooler below it; and a pooler of
            a model without any head. Only where a head may be new, another one may be left out.
        info: the loading report of transformers: ``missing_keys``, ``unexpected_keys``, and ``mismatched_keys`` with
            the shape in the file and that in the model.
        path: the checkpoint, for messages.

    Raises:
        LowRankKitError: names every weight that is missing, not expected, or of another shape.
    """
    heads, poolers = _known_on_top()
    may_be_new = head in ("classification", "base")
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    above = {name for name in missing if _top(name, model) in heads | poolers} if may_be_new else set()
    new = _modules(model, above)
    present = set(model.state_dict()) - missing
    is_half = any(name.startswith(tuple(f"{module}." for module in new)) for name in present)
    # A trained head reads the pooler that it was trained with.
    lost_pooler = head == "classification" and not any(_top(name, model) in heads for name in above)
    if is_half or lost_pooler:
        above, new = set(), ()
    other = {name for name in unexpected if _top(name, model) in heads | poolers} if may_be_new else set()
    faults = []
    if lacking := missing - above:
        faults.append(f"it lacks {_listed(lacking)}")
    if foreign := unexpected - other:
        faults.append(f"it has {_listed(foreign)}, for which there is no place")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        faults.append(f"{name} is {list(found)} there, and {list(wanted)} by its config.json and the task")
    if faults:
        raise LowRankKitError(
            f"'{path}' is not a whole {type(model).__name__}: {'; '.join(faults)}. Fetch it or write it again, or give "
            "the checkpoint that its config.json belongs to"
        )
    left_out = tuple(sorted({_top(name, model) for name in other}))
    if new:
        log.info("%s has no %s: it starts at random, to be trained", path, ", ".join(new))
    if left_out and head == "classification":
        log.info("%s has %s, which this model has no use for: left out", path, ", ".join(left_out))
    return OnTop(new, left_out)


def _known_on_top() -> tuple[set[str], set[str]]:
    """The heads and the poolers of all families, by the first part of a name; span extraction has a head too."""
    known = registered().values()
    heads = {head for architecture in known for head in architecture.heads}
    return heads | {"qa_outputs"}, {architecture.pooler for architecture in known if architecture.pooler}


def _top(name: str, model: PreTrainedModel) -> str:
    """The first part of a weight's name inside the base model, or of a head's."""
    return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]


def _modules(model: PreTrainedModel, names: Iterable[str]) -> tuple[str, ...]:
    """The modules on top of the model, or its pooler, that hold these weights."""
    prefix = f"{model.base_model_prefix}."
    tops = {(prefix if name.startswith(prefix) else "") + _top(name, model) for name in names}
    return tuple(sorted(tops))


def _listed(names: Iterable[str]) -> str:
    """Every name, those that differ in their block alone as one: ``layers.{3,4}.mlp.up_proj.weight``."""
    blocks: dict[str, list[str]] = {}
    for name in sorted(names):
        number = re.search(r"\.(\d+)\.", name)
        blocks.setdefault(re.sub(r"\.\d+\.", ".{}.", name, count=1), []).append(number[1] if number else "")
    shown = []
    for pattern, numbers in blocks.items():
        inside = ",".join(sorted(numbers, key=int)) if "{}" in pattern else ""
        shown.append(pattern.replace("{}", inside if len(numbers) == 1 else f"{{{inside}}}"))
    count = sum(len(numbers) for numbers in blocks.values())
    return f"{count} weight{'s' * (count > 1)} ({', '.join(shown)})"
