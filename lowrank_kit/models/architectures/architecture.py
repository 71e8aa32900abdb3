"""What an architecture is, as data: where the linears of its blocks are and what each does. The registry of all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from lowrank_kit.errors import LowRankKitError, did_you_mean

LOWRANK_PREFIX = "lowrank_"
"""Compressed models have a model type of their own: this, then the type of the model that was compressed."""

Kind = Literal["attention", "mlp", "expert"]
"""The part of a block that a linear belongs to."""

Product = Literal["query", "key", "value", "gate", "hidden", "fused", "residual"]
"""What a linear's outputs are; ``fused``: several of these side by side; ``residual``: added to the residual stream."""

Joining = Literal["added", "scaled", "normed"]
"""What those outputs meet on their way to the stream: nothing, a constant factor, or a norm of them or of the sum."""


@dataclass(frozen=True)
class Role:
    """What a linear does in its block.

    ``name`` is what configurations and plans call it. ``of_source``: it reads the encoder's hidden states (T5).
    """

    name: str
    kind: Kind
    product: Product
    of_source: bool = False

    @property
    def writes_residual(self) -> bool:
        """Whether its outputs are added to the residual stream."""
        return self.product == "residual"


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor: their paths in the block, in the order in which it executes them.

    ``norm`` is the path of the norm whose output that tensor is, if it is one's.
    """

    linears: Mapping[Role, str]
    norm: str | None = None


@dataclass(frozen=True)
class Experts:
    """Gated experts that transformers keeps as 3-D parameters ``gate_up_proj`` and ``down_proj``: their module's path.

    Every expert has linears with these three roles. ``norm`` is the path of the norm whose output they read.
    """

    path: str
    gate: Role
    up: Role
    down: Role
    norm: str | None = None


@dataclass(frozen=True)
class OneOf:
    """Alternatives, of which every block has the first whose modules all exist; an empty one may always be had."""

    alternatives: "tuple[tuple[Group | Experts, ...], ...]"


@dataclass(frozen=True)
class Stack:
    """A list of blocks: the path of its ``ModuleList``, and the groups of linears in each, in order of execution.

    ``routers`` are paths of modules that choose or weigh experts. They are left as they are.
    """

    blocks: str
    groups: tuple[Group | Experts | OneOf, ...]
    routers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Paths of stacks, embedding, final norm and pooler are relative to the base model (``LlamaModel``, not
    ``LlamaForCausalLM``), those of heads to the whole model.

    Attributes:
        stacks: in order of execution (T5: the encoder's, then the decoder's).
        embedding: of the tokens.
        final_norm: behind the last block; a given model may lack it.
        heads: modules on top of the base model, of which a given model has at most one.
        pooler: a module of the base model above its blocks, which some checkpoints lack.
        plain_residual: blocks add to the residual stream what they compute of its RMS norm and do nothing else to it,
            in modules that are called as Llama's.
        joining: how what a block's linears write reaches the residual stream. Unless that is behind norms, others read
            norms of the stream.
        blocks_stand_alone: a block takes nothing but the hidden states from those before it: some may be left out.
        heads_follow_width: the attention has as many heads as its separate query, key and value matrices have rows
            for, and the MLP is gated: both can be narrowed.
        starts_with_bos: was trained on texts that begin with BOS, whether or not its tokenizer puts it there.
        positions_start: the first position: 0, or the one behind the padding token's number.
    """

    stacks: tuple[Stack, ...]
    embedding: str
    final_norm: str | None
    heads: tuple[str, ...] = ("lm_head", "score")
    pooler: str | None = None
    plain_residual: bool = False
    joining: Joining = "added"
    blocks_stand_alone: bool = True
    heads_follow_width: bool = False
    starts_with_bos: bool = False
    positions_start: Literal["zero", "behind_padding"] = "zero"


_REGISTERED: dict[str, Architecture] = {}
_LISTENERS: list[Callable[[str], None]] = []


def register(architecture: Architecture, *model_types: str) -> None:
    """Make models of these types (``config.model_type``) known, from any package.

    Raises `LowRankKitError` for a type that is known already.
    """
    for model_type in model_types:
        if model_type in _REGISTERED:
            raise LowRankKitError(f"the architecture of model type '{model_type}' is registered already")
        _REGISTERED[model_type] = architecture
        for listener in _LISTENERS:
            listener(model_type)


def for_each(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with every model type that is registered, now and later."""
    _LISTENERS.append(listener)
    for model_type in _REGISTERED:
        listener(model_type)


def base_type(model_type: str) -> str:
    """The model type that the registry knows: for a compressed model, that of the original."""
    return model_type.removeprefix(LOWRANK_PREFIX)


def find(model_type: str) -> Architecture | None:
    """The architecture of a model type, also that of a compressed model; None for one that is not known."""
    return _REGISTERED.get(base_type(model_type))


def architecture_of(model_type: str) -> Architecture:
    """What `find` does. Raises `LowRankKitError` for a type that is not known, with what to add and where."""
    found = find(model_type)
    if found is None:
        raise LowRankKitError(
            f"model type '{model_type}' is not known{did_you_mean(model_type, _REGISTERED)}\n"
            f"To add it, call register(Architecture(...), '{model_type}') of lowrank_kit.models.architectures: it "
            "takes the paths of the block list, of a block's linears by role, of the embedding and of the final norm. "
            "Do so in a file of lowrank_kit/models/architectures/ (see llama.py there), or in a package of your own "
            "whose entry point in the group lowrank_kit.plugins names that module."
        )
    return found


def has_experts(model_type: str) -> bool:
    """Whether some blocks of the architecture may have experts. Errors of `architecture_of`."""
    found = (group for stack in architecture_of(model_type).stacks for group in stack.groups)
    choices = (group.alternatives if isinstance(group, OneOf) else ((group,),) for group in found)
    return any(isinstance(group, Experts) for choice in choices for groups in choice for group in groups)


def registered() -> dict[str, Architecture]:
    """Every architecture by model type, in order of registration."""
    return dict(_REGISTERED)


def all_with(condition: Callable[[Architecture], bool]) -> Iterator[str]:
    """The model types whose architecture meets a condition, for messages and tests."""
    return (model_type for model_type, architecture in _REGISTERED.items() if condition(architecture))
