"""`ModelLayout`: the blocks and linears of one model, by name, whatever its family and head."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean
from lowrank_kit.models.architectures import Architecture, Experts, Group, Kind, OneOf, Product, Role, architecture_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LinearRef:
    """One linear layer of a model.

    ``name`` is its module path; ``block`` counts over all blocks of the model in execution order. Linears of
    one block that read the same input tensor share an ``input_group``: one Gram matrix serves them all.
    ``rank`` is that of a linear which a compressed model holds as two factors, None for a dense one; if these are rows
    and coefficients, ``pivot_rows`` of its outputs are among the first factor's. The weight of a
    ``quantised`` one is packed integers. ``kind``, ``product`` and ``of_source`` are those of its `Role`; ``norm`` is
    the module path of the norm whose output it reads, if it is one's. ``expert`` is the number of the expert that it
    belongs to. A ``packed`` one is no module: its weight is a slice of a parameter that all experts share, until
    `list_experts` makes linears of them.
    """

    name: str
    block: int
    role: str
    in_features: int
    out_features: int
    has_bias: bool
    input_group: str
    rank: int | None = None
    pivot_rows: int = 0
    quantised: bool = False
    kind: Kind = "mlp"
    product: Product = "hidden"
    of_source: bool = False
    norm: str | None = None
    expert: int | None = None
    packed: bool = False

    @property
    def writes_residual(self) -> bool:
        """Whether its outputs are added to the residual stream, as they are or as the family changes them."""
        return self.product == "residual"

    @property
    def parameters(self) -> int:
        """Entries of the weight as a dense matrix; a bias does not count."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """The smaller side. As a rank in a compressor's plan it means: left dense."""
        return min(self.in_features, self.out_features)

    @property
    def parts(self) -> "tuple[LinearRef, ...]":
        """The dense linears that it is made of: itself, or the two halves of a factored one in execution order."""
        if self.rank is None:
            return (self,)
        between = f"{self.name}.down:up"
        down = replace(self, name=f"{self.name}.down", out_features=self.rank, has_bias=False, rank=None)
        rest = self.out_features - self.pivot_rows
        up = replace(
            self, name=f"{self.name}.up", in_features=self.rank, out_features=rest, input_group=between, rank=None
        )
        return tuple(replace(part, pivot_rows=0) for part in (down, up))


@dataclass(frozen=True)
class ModelLayout:
    """Where everything is: module paths in the model that the layout was made from.

    ``blocks`` and ``linears`` are in execution order; ``stacks`` are the blocks by stack (T5: two stacks).
    ``on_top`` are the modules above the blocks that a checkpoint may lack: head and pooler. ``head_dim`` is the width
    of an attention head, ``itemsize`` the bytes of a weight.
    """

    model_type: str
    stacks: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    linears: tuple[LinearRef, ...]
    embedding: str
    final_norm: str | None
    head: str | None
    on_top: tuple[str, ...]
    head_dim: int
    itemsize: int = 4

    @property
    def parameters(self) -> int:
        """Of all linears in the blocks, as dense matrices."""
        return sum(ref.parameters for ref in self.linears)

    def blocks_of(self, stack: int) -> range:
        """The numbers of a stack's blocks, counted over all stacks."""
        first = sum(len(earlier) for earlier in self.stacks[:stack])
        return range(first, first + len(self.stacks[stack]))

    def stack_of(self, block: int) -> int:
        """The stack that a block is in."""
        return next(stack for stack in range(len(self.stacks)) if block in self.blocks_of(stack))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that exist in this model, in order of first appearance."""
        return tuple(dict.fromkeys(ref.role for ref in self.linears))

    def of_roles(self, roles: Sequence[str] | None = None) -> tuple[LinearRef, ...]:
        """Return the linears with these roles (None: all), in execution order.

        Raises `ConfigError` for a role that no linear of the model has, and for no role at all.
        """
        if roles is not None and not roles:
            raise ConfigError(
                f"method.roles=[] names no linear: leave it out for all, or choose of {', '.join(self.roles)}"
            )
        for role in roles or ():
            if role not in self.roles:
                hint = did_you_mean(role, self.roles)
                raise ConfigError(
                    f"no linear of this {self.model_type} has the role '{role}'{hint} (it has {', '.join(self.roles)})"
                )
        return tuple(ref for ref in self.linears if roles is None or ref.role in roles)

    def select(self, roles: Sequence[str] | None = None) -> tuple[LinearRef, ...]:
        """Return what `of_roles` does, for a method that works on dense linears.

        Raises `ConfigError` of `of_roles`, and for a linear that is quantised or factored already.
        """
        selected = self.of_roles(roles)
        if quantised := [ref for ref in selected if ref.quantised]:
            raise ConfigError(
                f"this {self.model_type} is quantised: {len(quantised)} of {len(selected)} linears are, first "
                f"{quantised[0].name}. Start from the original model"
            )
        if factored := [ref for ref in selected if ref.rank is not None]:
            raise ConfigError(
                f"this {self.model_type} is compressed already: {len(factored)} of {len(selected)} linears are "
                f"factored, first {factored[0].name} (rank {factored[0].rank}). Start from the original model, or "
                "multiply the factors out: python -m lowrank_kit.export FOLDER --format dense --output DENSE_FOLDER"
            )
        return selected


def layout_of(model: "PreTrainedModel") -> ModelLayout:
    """Describe a transformers model; its parameters may be on the meta device.

    Raises `LowRankKitError` for a model type that is not registered, for a module that its architecture promises and
    the model lacks, and for a linear that is neither Linear, Conv1D nor LowRankLinear nor quantised.
    """
    model_type: str = model.config.model_type
    architecture = architecture_of(model_type)
    modules = dict(model.named_modules())
    # Llama 4's text model is not where its class says.
    prefixes = (f"{model.base_model_prefix}.", "model.", "")
    base = next((prefix for prefix in prefixes if prefix + architecture.embedding in modules), "")
    _check_paths([base + architecture.embedding, *(base + stack.blocks for stack in architecture.stacks)], modules)
    stacks = tuple(tuple(_blocks(base + stack.blocks, modules)) for stack in architecture.stacks)
    head = next((name for name in architecture.heads if name in modules), None)
    pooler = None if architecture.pooler is None else base + architecture.pooler
    final_norm = None if architecture.final_norm is None else base + architecture.final_norm
    return ModelLayout(
        model_type=model_type,
        stacks=stacks,
        blocks=tuple(path for stack in stacks for path in stack),
        linears=tuple(_linears(architecture, stacks, modules)),
        embedding=base + architecture.embedding,
        # OPT models with post-normalised blocks have none.
        final_norm=final_norm if final_norm in modules else None,
        head=head,
        on_top=tuple(name for name in (pooler, head) if name is not None and name in modules),
        head_dim=_head_dim(model.config.get_text_config()),
        itemsize=model.dtype.itemsize,
    )


def _head_dim(config: "PretrainedConfig") -> int:
    explicit = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return explicit or config.hidden_size // config.num_attention_heads


def _blocks(path: str, modules: "dict[str, nn.Module]") -> Iterator[str]:
    return (f"{path}.{name}" for name, _ in modules[path].named_children())


def _linears(
    architecture: Architecture, stacks: Sequence[Sequence[str]], modules: "dict[str, nn.Module]"
) -> Iterator[LinearRef]:
    block = 0
    for stack, paths in zip(architecture.stacks, stacks, strict=True):
        for block_path in paths:
            for group in _groups_of(stack.groups, block_path, modules):
                if isinstance(group, Experts):
                    yield from _experts(group, block_path, block, modules)
                else:
                    yield from _group(group, block_path, block, modules)
            block += 1


def _groups_of(
    groups: Sequence[Group | Experts | OneOf], block_path: str, modules: "dict[str, nn.Module]"
) -> Iterator[Group | Experts]:
    """The groups that this block has. Raises `LowRankKitError` for a module that it lacks."""
    for entry in groups:
        alternatives = entry.alternatives if isinstance(entry, OneOf) else ((entry,),)
        wanted = [[f"{block_path}.{path}" for group in found for path in _paths(group)] for found in alternatives]
        present = [all(path in modules for path in paths) for paths in wanted]
        if not any(present):
            _check_paths(min(wanted, key=lambda paths: sum(path not in modules for path in paths)), modules)
        yield from alternatives[present.index(True)]


def _paths(group: Group | Experts) -> Iterable[str]:
    return (group.path,) if isinstance(group, Experts) else group.linears.values()


def _group(group: Group, block_path: str, block: int, modules: "dict[str, nn.Module]") -> Iterator[LinearRef]:
    for role, path in group.linears.items():
        name = f"{block_path}.{path}"
        yield LinearRef(
            name,
            block,
            role.name,
            *_sizes(modules[name], name),
            input_group=f"{block_path}:{'+'.join(role.name for role in group.linears)}",
            **_factored(modules[name]),
            quantised=_is_quantised(modules[name]),
            kind=role.kind,
            product=role.product,
            of_source=role.of_source,
            norm=None if group.norm is None else f"{block_path}.{group.norm}",
        )


def _experts(group: Experts, block_path: str, block: int, modules: "dict[str, nn.Module]") -> Iterator[LinearRef]:
    path = f"{block_path}.{group.path}"
    module: Any = modules[path]
    for expert in range(module.num_experts):
        for part, role in {"gate": group.gate, "up": group.up, "down": group.down}.items():
            name = f"{path}.{expert}.{part}"
            linear = modules.get(name)
            norm = None if group.norm is None or role.writes_residual else f"{block_path}.{group.norm}"
            yield LinearRef(
                name,
                block,
                role.name,
                *(_packed_sizes(module, role) if linear is None else _sizes(linear, name)),
                input_group=f"{path}.{expert}:{'down' if role.writes_residual else 'gate+up'}",
                **({} if linear is None else _factored(linear)),
                kind=role.kind,
                product=role.product,
                norm=norm,
                expert=expert,
                packed=linear is None,
            )


def _check_paths(paths: Sequence[str], modules: "dict[str, nn.Module]") -> None:
    for path in paths:
        if path not in modules:
            raise LowRankKitError(
                f"this model is not built as its architecture in lowrank_kit.models.architectures says: it has no "
                f"module '{path}'"
            )


def _sizes(module: "nn.Module", name: str) -> tuple[int, int, bool]:
    """In and out features, and whether there is a bias."""
    # Imported with a model at hand: whoever only reads settings does without torch.
    from lowrank_kit.models.linear import check_linear, is_quantised, weight_of
    from lowrank_kit.models.portable import LowRankLinear

    if isinstance(module, LowRankLinear):
        return module.in_features, module.out_features, module.dense_bias() is not None
    if is_quantised(module):
        return module.in_features, module.out_features, module.bias is not None
    dense = check_linear(module, name)
    out_features, in_features = weight_of(dense).shape
    return in_features, out_features, dense.bias is not None


def _packed_sizes(experts: Any, role: Role) -> tuple[int, int, bool]:
    """The same of one expert's matrix, of 3-D parameters."""
    from lowrank_kit.models.portable import is_transposed

    inner, outer = experts.down_proj.shape[1:] if is_transposed(experts) else experts.down_proj.shape[:0:-1]
    has_bias = hasattr(experts, "down_proj_bias")
    return (inner, outer, has_bias) if role.writes_residual else (outer, inner, has_bias)


def _factored(module: "nn.Module") -> dict[str, Any]:
    """What a `LinearRef` says of a factored linear; nothing for a dense one."""
    from lowrank_kit.models.portable import LowRankLinear

    if not isinstance(module, LowRankLinear):
        return {}
    return {"rank": module.rank, "pivot_rows": module.pivot_rows or 0}


def _is_quantised(module: "nn.Module") -> bool:
    from lowrank_kit.models.linear import is_quantised

    return is_quantised(module)
