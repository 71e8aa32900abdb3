"""What a method is: a frozen configuration that says what it needs, plans, and computes factors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from lowrank_kit.calibration.collect import Kept
from lowrank_kit.calibration.statistics import LayerStatistics, StatisticsRequest
from lowrank_kit.config import Section
from lowrank_kit.errors import ConfigError, did_you_mean
from lowrank_kit.models.layout import LinearRef, ModelLayout


@dataclass(frozen=True)
class LowRankFactors:
    """A product ``up @ down`` of rank r."""

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]


@dataclass(frozen=True)
class Plan:
    """A method's global decision, plain JSON: the rank of every matrix and what that costs in parameters.

    ``parameters_before`` counts the model's block linears; ``parameters_after`` those and the adapter's, or what
    compression leaves of them. A compressor's matrix at rank min(out, in) is left dense, one at rank 0 is gone.
    ``kept`` says what is left where it is not the leading part: singular components, heads or channels, by name.
    """

    method: str
    ranks: dict[str, int]
    kept_blocks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    scores: dict[str, float] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)


class Method(Section):
    """A method's settings. Subclasses add theirs; their fields are the keys of ``conf/method/NAME.yaml``."""

    name: str
    """Name in tables and run directories."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for settings that no model of this layout can meet. Reads shapes, no weights."""


class Adapter(Method):
    """A low-rank adapter ``W + s B A`` that PEFT carries, with B: [out, r] (up) and A: [r, in] (down).

    The scaling s is ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732).
    """

    rank: int = Field(default=8, ge=1)
    """Rank r of every adapted matrix, unless `rank_pattern` or an allocation says otherwise."""
    alpha: float | None = Field(default=None, gt=0)
    """Scaling numerator; null: the matrix's own rank, so that s = 1 (sqrt(rank) with rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    roles: tuple[str, ...] | None = None
    """Roles to adapt (q k v o gate up down, or the family's own); null: every linear in the blocks."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Rank by role, or by a regular expression that matches a whole module path; it overrides `rank`."""
    train: Literal["both", "down", "up"] = "both"
    """Which factors learn. `down` freezes B, so that every update stays in its column space."""

    @field_validator("rank_pattern")
    @classmethod
    def _patterns_compile(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is neither a role nor a regular expression: {error}") from None
        return patterns

    def targets(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        """The linears to adapt. Raises `ConfigError` for a role that the model does not have."""
        return layout.select(self.roles)

    def base_ranks(self, layout: ModelLayout) -> dict[str, int]:
        """The configured rank of every target, by name, before any allocation."""
        return {ref.name: self._configured_rank(ref) for ref in self.targets(layout)}

    def alpha_of(self, rank: int) -> float:
        """The scaling numerator of a matrix of this rank."""
        return float(rank) if self.alpha is None else self.alpha

    def scaling(self, rank: int) -> float:
        """The factor s on the product ``B A``."""
        return self.alpha_of(rank) / (rank**0.5 if self.rslora else rank)

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for a pattern that matches nothing or a rank above a matrix's smaller side."""
        targets = self.targets(layout)
        for pattern in self.rank_pattern:
            if not any(_matches(pattern, ref) for ref in targets):
                raise ConfigError(
                    f"method.rank_pattern: '{pattern}' matches no adapted linear{did_you_mean(pattern, layout.roles)}"
                )
        for ref in targets:
            rank, largest = self._configured_rank(ref), min(ref.in_features, ref.out_features)
            if rank > largest:
                raise ConfigError(
                    f"method.rank={rank} does not fit {ref.name} (role {ref.role}), a {ref.out_features}x"
                    f"{ref.in_features} matrix: legal are 1 to {largest}; lower method.rank, or set "
                    f"method.rank_pattern={{{ref.role}: {largest}}} for this role alone"
                )

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """Decide every rank. ``kept`` is what calibration kept of each target, empty without calibration."""
        return self._plan_with(layout, self.base_ranks(layout))

    def _plan_with(self, layout: ModelLayout, ranks: dict[str, int], scores: dict[str, float] | None = None) -> Plan:
        before = sum(ref.in_features * ref.out_features for ref in layout.linears)
        adapter = sum((ref.in_features + ref.out_features) * ranks[ref.name] for ref in self.targets(layout))
        return Plan(self.name, ranks, tuple(range(len(layout.blocks))), before, before + adapter, scores or {})

    def _configured_rank(self, ref: LinearRef) -> int:
        return next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, ref)), self.rank)


class InitialisedAdapter(Adapter):
    """An adapter whose initial product is not zero: it starts from the weights and their statistics."""

    base: Literal["residual", "untouched"] = "residual"
    """`residual` takes the initial product out of W; `untouched` leaves W alone and subtracts the frozen product in
    the forward pass (quantised bases, several adapters on one base)."""

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


class Compressor(Method):
    """Makes the model smaller, without training."""

    factorises: ClassVar[bool] = False
    """Whether some linears become products of two, which recovery may train."""

    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of the decoder-linear parameters (all linears in the blocks) that is removed."""

    @property
    def probe(self) -> tuple[int, int] | None:
        """Held-out calibration windows to measure the model on, as (how many, tokens each); None: no need of any."""
        return None

    def check_tokens(self, layout: ModelLayout, tokens: int) -> None:
        """Raise `ConfigError` for too few calibration tokens."""

    def budget(self, layout: ModelLayout) -> int:
        """Parameters that may be left of the linears in the blocks."""
        total = sum(ref.out_features * ref.in_features for ref in layout.linears)
        # 1 - 0.9 is a hair less than a tenth in binary.
        return int(round((1 - self.ratio) * total, 6))


def _matches(pattern: str, ref: LinearRef) -> bool:
    return pattern == ref.role or re.fullmatch(pattern, ref.name) is not None
