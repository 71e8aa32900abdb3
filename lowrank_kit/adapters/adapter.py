"""What an adapter is: a frozen configuration that says what it needs, plans, and computes factors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from jaxtyping import Float
from pydantic import Field, field_validator, model_validator

from lowrank_kit.calibration.statistics import Kept, LayerStatistics, StatisticsRequest
from lowrank_kit.config import Method, ModelConfig, RuntimeConfig, SingleTask
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError, did_you_mean
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.factors import LowRankFactors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# Inputs of a model on its device, right-padded, with attention masks.
Batches: TypeAlias = Sequence[dict[str, Tensor]]


class FineTuning(Method):
    """A method that trains: every adapter, and full fine-tuning."""

    trains: ClassVar[bool] = True

    roles: tuple[str, ...] | None = None
    """Roles to train (q k v o gate up down, or the family's own); null: every linear in the blocks."""

    def requirements(self, model: ModelConfig, runtime: RuntimeConfig, task: SingleTask) -> Iterator[str]:
        """A task that teaches something, and a model that is not spread over devices."""
        if not task.teaches:
            yield (
                f"method={self.name} is trained, and task={task.name} has nothing to learn from (task.instructions): "
                "choose a task that has, such as commonsense, math, code or glue/sst2, or a method that compresses, or "
                "method=none"
            )
        if runtime.placement is not None:
            yield runtime.not_for_training

    def targets(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        """The linears to train, of a factored one both halves; where all experts are one parameter, attention alone.

        To such a parameter no adapter can be attached, and PEFT takes names of other MLP matrices for the experts'.
        Raises `ConfigError` for a role that is not there, or that cannot be adapted.
        """
        refs = self._chosen(layout)
        if any(ref.packed for ref in layout.linears):
            others = dict.fromkeys(ref.role for ref in refs if ref.kind != "attention")
            if self._chooses and others:
                raise ConfigError(
                    f"{self._chooses}: {', '.join(others)} of this {layout.model_type} cannot be adapted, for its "
                    "experts are one parameter: leave them out"
                )
            refs = tuple(ref for ref in refs if ref.kind == "attention")
        return tuple(part for ref in refs for part in ref.parts)

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """Decide every rank. ``kept`` is what calibration kept of each target, empty without calibration."""
        raise NotImplementedError

    @property
    def _chooses(self) -> str | None:
        """The setting that names linears, if there is one."""
        return None if self.roles is None else "method.roles"

    def _chosen(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        """The linears that are named."""
        return layout.of_roles(self.roles)

    def _plan_with(
        self,
        layout: ModelLayout,
        ranks: dict[str, int],
        *,
        added: int = 0,
        trained: int,
        scores: dict[str, float] | None = None,
    ) -> Plan:
        before = sum(part.parameters for ref in layout.linears for part in ref.parts)
        blocks = tuple(range(len(layout.blocks)))
        return Plan(self.name, ranks, blocks, before, before + added, scores or {}, trained_parameters=trained)


class Adapter(FineTuning):
    """A low-rank adapter ``W + s B A`` that PEFT carries, with B: [out, r] (up) and A: [r, in] (down).

    The scaling s is ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732).
    """

    adapts: ClassVar[bool] = True
    takes_from_base: ClassVar[bool] = False
    """Whether PEFT's initialisation takes a product that is not zero out of the base weight."""
    rows_a_batch: ClassVar[int | None] = None
    """Calibration samples that are read at once; None: as many as `calibration.batch_size` says."""

    target_modules: str | tuple[str, ...] | None = Field(default=None, exclude_if=lambda wanted: wanted is None)
    """Linears to adapt as PEFT names them: ends of module paths, such as `[q_proj, v_proj]`, one regular expression of
    whole paths, or `all-linear`; null: `roles`."""
    rank: int = Field(default=8, ge=1)
    """Rank r of every adapted matrix, unless `rank_pattern` or an allocation says otherwise."""
    match_parameters: int | None = Field(default=None, ge=1, exclude_if=lambda wanted: wanted is None)
    """Take the largest rank, the same for all matrices and at most their smallest side, with which the adapter trains
    no more than so many parameters (a new head not counted), in place of `rank`; null: `rank` as it is."""
    alpha: float | None = Field(default=None, gt=0)
    """Scaling numerator; null: the matrix's own rank, so that s = 1 (sqrt(rank) with rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Rank by role, or by a regular expression that matches a whole module path; it overrides `rank`."""
    train: Literal["both", "down", "up"] = "both"
    """Which factors learn. `down` freezes B, so that every update stays in its column space."""

    @model_validator(mode="after")
    def _targets_are_named_once(self) -> "Adapter":
        if self.target_modules is not None and self.roles is not None:
            raise ValueError("target_modules and roles both name what is adapted: leave one out")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules: '{self.target_modules}' is no regular expression: {error}") from None
        return self

    @field_validator("rank_pattern")
    @classmethod
    def _patterns_compile(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is neither a role nor a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _one_source_of_ranks(self) -> "Adapter":
        if self.match_parameters is not None and self.rank_pattern:
            raise ValueError("match_parameters gives all matrices one rank: leave rank_pattern empty")
        return self

    def matched(self, layout: ModelLayout) -> "Adapter":
        """Return the method with the rank that `match_parameters` asks for, or as it is.

        The rank is the largest r, the same for all targets, at which they train no more than ``match_parameters``
        parameters, counting only what learns (``train=down``: A alone; DoRA: the magnitudes too); it is not raised
        above the smallest side of a target. Raises `ConfigError` where rank 1 trains more than that already.
        """
        if self.match_parameters is None:
            return self
        targets = self.targets(layout)
        wanted = self.match_parameters
        least = sum(self.trained_by(ref, 1) for ref in targets)
        if least > wanted:
            raise ConfigError(
                f"method.match_parameters={wanted}: rank 1 on {len(targets)} linears trains {least} already; "
                f"raise it to {least} or more, or adapt fewer roles (method.roles)"
            )
        per_rank = sum(self.trained_by(ref, 2) - self.trained_by(ref, 1) for ref in targets)
        rank = min(1 + (wanted - least) // per_rank, *(ref.full_rank for ref in targets))
        return self.model_copy(update={"rank": rank, "match_parameters": None})

    def trained_by(self, ref: LinearRef, rank: int) -> int:
        """Parameters that learn at one linear."""
        return rank * (ref.in_features * (self.train != "up") + ref.out_features * (self.train != "down"))

    def base_ranks(self, layout: ModelLayout) -> dict[str, int]:
        """The configured rank of every target, by name, before any allocation."""
        matched = self.matched(layout)
        return {ref.name: matched._configured_rank(ref) for ref in self.targets(layout)}

    @property
    def changes_base(self) -> bool:
        """Whether the base weights give up what the adapter starts from."""
        return self.takes_from_base

    @property
    def reads_floats(self) -> bool:
        """Whether the base weights must not be quantised."""
        return self.changes_base

    @property
    def up_learning_rate_ratio(self) -> float | None:
        """Learning rate of B over that of A; None: equal."""
        return None

    def alpha_of(self, rank: int) -> float:
        """The scaling numerator of a matrix of this rank."""
        return float(rank) if self.alpha is None else self.alpha

    def scaling(self, rank: int) -> float:
        """The factor s on the product ``B A``."""
        return self.alpha_of(rank) / (rank**0.5 if self.rslora else rank)

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for a pattern that matches nothing, a rank above a matrix's smaller side, and quantised
        weights where the method has no use for them."""
        targets, ranks = self.targets(layout), self.base_ranks(layout)
        for pattern in self.rank_pattern:
            if not any(_matches(pattern, ref) for ref in targets):
                raise ConfigError(
                    f"method.rank_pattern: '{pattern}' matches no adapted linear{did_you_mean(pattern, layout.roles)} "
                    f"(adapted roles: {', '.join(dict.fromkeys(ref.role for ref in targets))})"
                )
        for ref in targets:
            if ref.quantised and self.reads_floats:
                raise ConfigError(
                    f"{ref.name} is quantised, and method={self.name} starts from its weights or changes them: "
                    f"{self._for_quantised()}, or load the model unquantised"
                )
            if ranks[ref.name] > ref.full_rank:
                raise ConfigError(
                    f"method.rank={ranks[ref.name]} does not fit {ref.name} (role {ref.role}), a {ref.out_features}x"
                    f"{ref.in_features} matrix: legal are 1 to {ref.full_rank}; lower method.rank, or set "
                    f"method.rank_pattern={{{ref.role}: {ref.full_rank}}} for this role alone"
                )

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """See `FineTuning`."""
        return self._plan_of(layout, self.base_ranks(layout))

    def lora_options(self) -> dict[str, Any]:
        """Fields of PEFT's `LoraConfig` that make this method, beside targets, ranks, scaling and dropout."""
        return {}

    def collect(self, model: "PreTrainedModel", targets: Sequence[LinearRef], batches: Batches) -> dict[str, Kept]:
        """What an initialisation of PEFT has to know of every target before ranks are decided."""
        return {}

    def wrap(
        self,
        model: "PreTrainedModel",
        config: "LoraConfig",
        kept: Mapping[str, Kept],
        batches: Batches,
    ) -> "PeftModel":
        """Let PEFT put the adapter into ``model``; ``kept`` is what `collect` found."""
        from peft import get_peft_model

        return get_peft_model(model, config)

    @property
    def _chooses(self) -> str | None:
        return "method.target_modules" if self.target_modules is not None else super()._chooses

    def _chosen(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        wanted = self.target_modules
        if wanted is None or wanted == "all-linear":
            return super()._chosen(layout)
        patterns = (wanted,) if isinstance(wanted, str) else tuple(rf"(.*\.)?{re.escape(name)}" for name in wanted)
        names = (wanted,) if isinstance(wanted, str) else wanted
        for name, pattern in zip(names, patterns, strict=True):
            if not any(re.fullmatch(pattern, ref.name) for ref in layout.linears):
                known = tuple(dict.fromkeys(ref.name.rpartition(".")[2] for ref in layout.linears))
                raise ConfigError(
                    f"method.target_modules: '{name}' matches no linear in the blocks of this {layout.model_type}"
                    f"{did_you_mean(name, known)} (their paths end in {', '.join(known)})"
                )
        if not patterns:
            raise ConfigError("method.target_modules=[] names no linear: leave it out for all")
        return tuple(ref for ref in layout.linears if any(re.fullmatch(pattern, ref.name) for pattern in patterns))

    def _plan_of(self, layout: ModelLayout, ranks: dict[str, int], scores: dict[str, float] | None = None) -> Plan:
        targets = [ref for ref in self.targets(layout) if ref.name in ranks]
        added = sum((ref.in_features + ref.out_features) * ranks[ref.name] for ref in targets)
        trained = sum(self.trained_by(ref, ranks[ref.name]) for ref in targets)
        return self._plan_with(layout, ranks, added=added, trained=trained, scores=scores)

    def _for_quantised(self) -> str:
        return "choose method=lora, dora, lora_plus or eva, or method=astra method.base=untouched"

    def _configured_rank(self, ref: LinearRef) -> int:
        return next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, ref)), self.rank)


class InitialisedAdapter(Adapter):
    """An adapter whose initial product is not zero: it starts from the weights and their statistics."""

    base: Literal["residual", "untouched"] = "residual"
    """`residual` takes the initial product out of W; `untouched` leaves W alone and subtracts the frozen product in
    the forward pass (quantised bases, several adapters on one base)."""

    @property
    def calibrates(self) -> bool:
        """See `Method`."""
        return self.needs() is not None

    @property
    def changes_base(self) -> bool:
        """See `Adapter`."""
        return self.base == "residual"

    def _for_quantised(self) -> str:
        return "set method.base=untouched"

    def needs(self) -> StatisticsRequest | None:
        """What calibration has to collect; None where the weights alone decide."""
        return None

    def reduce(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, statistics: LayerStatistics
    ) -> Kept:
        """Keep what `plan` and `initialise` will read of one layer; its statistics are freed afterwards."""
        return {}

    def reduction_key(self) -> dict[str, object]:
        """Every setting that the outcome of `reduce` depends on, for the calibration cache."""
        return self.model_dump(mode="json")

    def initialise(self, weight: Float[Tensor, "out in"], kept: Kept, rank: int) -> LowRankFactors:
        """The factors to start from, float64; ``kept`` is empty without calibration."""
        raise NotImplementedError


def _matches(pattern: str, ref: LinearRef) -> bool:
    return pattern == ref.role or re.fullmatch(pattern, ref.name) is not None
