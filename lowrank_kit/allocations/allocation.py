"""The words of rank allocation: `Candidate`, `Budget`, `Probe` and `Allocation`."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.allocations.keep import Keep
from lowrank_kit.config import Choice
from lowrank_kit.deferred import Tensor
from lowrank_kit.models.architectures import Kind, Product
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.storages.storage import Price
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.truncations.spectra import Spectrum

if TYPE_CHECKING:
    from lowrank_kit.allocations.narrowing import Narrowing


@dataclass(frozen=True)
class Candidate:
    """A matrix whose rank is to be decided; or several of one role stacked on a joint basis.

    n stacked members [out, in] share one `down` [k, in] and have an `up` [out, k] each: a matrix [n out, in].
    """

    name: str
    """The linear's name; of a joint basis, the first member's."""
    members: tuple[LinearRef, ...]
    """One linear, or the members of a joint basis: same role, same shape."""
    tail: Float64[Tensor, " p"]
    """Squared singular values in the truncation's own metric, descending: cutting at k costs `tail[k:].sum()`."""
    spectra: Mapping[str, Float64[Tensor, " _"]] = field(default_factory=dict)
    """What the rule's `needs` asked for, by the spectrum's name."""
    roundings: Mapping[int, Float64[Tensor, " _"]] = field(default_factory=dict)
    """By bits, what rounding adds to the loss: by component, and last that of the matrix left dense."""
    price: Price = field(default_factory=Factors)
    """What a rank costs, in the form in which it will lie in the model."""

    @property
    def role(self) -> str:
        """Role of the members."""
        return self.members[0].role

    @property
    def kind(self) -> Kind:
        """The part of a block that the members belong to."""
        return self.members[0].kind

    @property
    def product(self) -> Product:
        """What the members' outputs are."""
        return self.members[0].product

    @property
    def block(self) -> int:
        """Block of the first member."""
        return self.members[0].block

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the (stacked) matrix."""
        return len(self.members) * self.members[0].out_features, self.members[0].in_features

    @property
    def first_rank_cost(self) -> int:
        """What the first rank costs; with two factors every one does."""
        return self.price.cost(*self.shape, 1)

    @cached_property
    def dense_cost(self) -> int:
        """Of the matrix that is not cut."""
        return self.price.dense_cost(*self.shape)

    @cached_property
    def full_rank(self) -> int:
        """The smaller side. As a rank in an answer it means: left dense."""
        return min(self.shape)

    @cached_property
    def break_even(self) -> int:
        """Largest rank that saves parameters and is below a member's full rank; 0 for one row or column."""
        return bisect_left(range(1, self.members[0].full_rank), self.dense_cost, key=self.cost)

    def cost(self, rank: int) -> int:
        """At this rank; `full_rank` means dense."""
        return self.dense_cost if rank == self.full_rank else self.price.cost(*self.shape, rank)

    def loss(self, rank: int) -> float:
        """Estimate of what this rank loses, in the truncation's metric, and rounding with it."""
        lost = float(self.tail[rank:].sum())
        if self.price.rounding is None:
            return lost
        added = self.roundings[self.price.rounding.bits]
        return float(added[-1]) if rank == self.full_rank else lost + float(added[:-1][:rank].sum())

    def rank_at(self, parameters: float | int) -> float:
        """The rank that costs so many parameters, between whole ones in proportion."""
        cost = partial(self.price.cost, *self.shape)
        rank = bisect_right(range(1, self.members[0].full_rank), parameters, key=cost)
        # 0.7 of 90000 is a hair less than 63000 in binary, and must not count as less than what they buy.
        return round(rank + (parameters - cost(rank)) / (cost(rank + 1) - cost(rank)), 6)


@dataclass(frozen=True)
class Budget:
    """What the candidates may cost together, and what every rule has to keep to."""

    parameters: int
    """Parameters of all candidates together, dense ones at their full cost; or bytes, if `unit` says so."""
    multiple: int = 1
    """Ranks are multiples of this, at least one; a matrix is never removed, not even one of zeros."""
    floor: float = 0.0
    """No rank below this share (0 to 1) of the uniform one, rounded down to a multiple."""
    dense: bool = True
    """A matrix may be left dense; without it ranks stop at break-even."""
    block_floors: Mapping[int, float] = field(default_factory=dict)
    """Floors of single blocks, where they are above `floor`."""
    elsewhere: int = 0
    """Parameters of linears that stay dense whatever is decided; only so that messages can speak of the whole ratio.
    A budget for one role of many takes its share of them."""
    unit: str = "parameters"
    """What the candidates' prices are in."""

    def floor_of(self, candidate: Candidate) -> float:
        """The floor of a candidate, as a share of its uniform rank."""
        return max(self.floor, self.block_floors.get(candidate.block, 0.0))


@runtime_checkable
class Probe(Protocol):
    """The model itself, measured on held-out calibration text."""

    def loss_change(self, ranks: Mapping[str, int]) -> float:
        """Mean token loss with these candidates cut to these ranks, minus that of the dense model (nats)."""
        ...

    def divergence(self, ranks: Mapping[str, int]) -> float:
        """Mean over tokens of KL(dense || cut) of the next token's distributions (nats)."""
        ...


class Allocation(Choice):
    """A rule's settings: the fields are the keys of ``conf/allocation/NAME.yaml``."""

    crosses_roles: ClassVar[bool] = False
    """The rule compares or moves ranks across roles: it must see all candidates at once, under one budget."""
    adds_losses: ClassVar[bool] = False
    """The rule minimises a sum of losses, so that other options than ranks may stand beside them."""
    chooses_bits: ClassVar[bool] = False
    """The rule chooses bits beside ranks: it has `ranks_and_bits`."""

    keep: Keep = Field(default_factory=Keep)
    """What the rule does not decide. `ranks` never sees it."""

    @property
    def probe(self) -> tuple[int, int] | None:
        """Held-out calibration windows on which `ranks` measures the model, as (how many, tokens each); None: none."""
        return None

    def needs(self) -> frozenset[Spectrum]:
        """The spectra it reads besides `Candidate.tail`."""
        return frozenset()

    def check(self, candidates: Sequence[Candidate], budget: Budget) -> None:
        """Raise `ConfigError` where the rule's own settings cannot meet the budget. Reads shapes, no spectra."""

    def ranks(self, candidates: Sequence[Candidate], budget: Budget, probe: Probe | None = None) -> dict[str, int]:
        """The rank of every candidate by name; `full_rank` means left dense.

        Together they cost at most the budget, and no candidate's next step would still fit.

        Raises:
            ConfigError: no ranks meet the budget; the message names the constraint and the nearest feasible value.
        """
        raise NotImplementedError

    def ranks_or_channels(
        self,
        candidates: Sequence[Candidate],
        narrowings: "Sequence[Narrowing]",
        budget: Budget,
        probe: Probe | None = None,
    ) -> dict[str, int]:
        """What `ranks` returns, and the channels left of every MLP that may be narrowed, for a rule that `adds_losses`.

        The matrices of a narrowed MLP are dense in the answer: it costs the sum over the candidates, less what the
        channels gone would. Raises as `ranks`.
        """
        raise NotImplementedError

    def ranks_and_bits(self, forms: Sequence[Sequence[Candidate]], budget: Budget) -> dict[str, tuple[Candidate, int]]:
        """The form that stands for every matrix, and its rank, by name, for a rule that `chooses_bits`.

        ``forms`` are the candidates that stand for one matrix each, unrounded first; their names are all the matrix's.
        Raises as `ranks`.
        """
        raise NotImplementedError


class MeasuredAllocation(Allocation):
    """A rule that measures the model by a `Probe`."""

    probe_windows: int = Field(default=4, ge=1)
    """Held-out calibration windows to measure on."""
    probe_seq_len: int = Field(default=512, ge=2)
    """Tokens of such a window."""

    @property
    def probe(self) -> tuple[int, int] | None:
        """See `Allocation`."""
        return self.probe_windows, self.probe_seq_len
