"""Compression by truncated SVD: any truncation (how a matrix is cut) with any allocation (who gets which rank).

The published methods are named pairs of the two, in ``conf/method/``; HiSVD, D-Rank, Swift-SVD, SVD-LLM and their
peers differ in nothing else.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import ClassVar, Literal

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.allocation import AnyAllocation
from lowrank_kit.allocation.base import Allocation, Budget, Candidate, Probe, Quantity
from lowrank_kit.allocation.budget import largest, options_of
from lowrank_kit.allocation.uniform import Uniform
from lowrank_kit.calibration.statistics import GradientRequest, Kept, StatisticsRequest
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.methods.base import Compressor, Plan
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.spectral.attribution import drop_change
from lowrank_kit.spectral.decompose import eigenvalues
from lowrank_kit.spectral.truncate import Projection
from lowrank_kit.truncation import AnyTruncation
from lowrank_kit.truncation.activations import Optimal
from lowrank_kit.truncation.base import Layer, check_tokens
from lowrank_kit.truncation.two_sided import TwoSided

WHAT_SPECTRA_NEED: dict[Quantity, StatisticsRequest] = {
    "weight": StatisticsRequest(),
    "whitened": Optimal().needs(),
    "two_sided": TwoSided().needs(),
    "change": StatisticsRequest(gradient=GradientRequest(mean=True)),
}


class TruncatedSVD(Compressor):
    """A truncation and an allocation under one exact budget."""

    factorises: ClassVar[bool] = True

    truncation: AnyTruncation
    """How a matrix is cut: the metric of the approximation."""
    allocation: AnyAllocation
    """Who gets which rank."""
    roles: tuple[str, ...] | None = None
    """Roles to compress (q k v o gate up down, or the family's own); null: every linear in the blocks. The budget
    counts the others too, at their full size."""
    scope: Literal["global", "role"] = "global"
    """`role` gives every role the same ratio and allocates inside it."""
    rank_multiple: int = Field(default=8, ge=1)
    """Ranks are multiples of this; 1 for parity with published code."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """No rank below this share of the uniform rank."""
    dense: bool = False
    """Matrices may be left dense; otherwise ranks end at break-even."""
    correction: Literal["none", "sequential", "residual"] = "none"
    """`sequential`: in order of execution, every matrix is first refitted to its ORIGINAL outputs on the inputs that
    the compressed model gives it. `residual`: moreover, o and down make up for what the residual stream lacks."""
    anchor: float = Field(default=1.0, ge=0)
    """Weight, in the sequential correction, of the error on the original inputs against that on the compressed ones."""
    ridge: float = Field(default=0.001, gt=0)
    """Pull of the sequential correction towards the original weight, as a share of the inputs' mean energy."""
    probe_windows: int = Field(default=4, ge=1)
    """Held-out calibration windows on which an allocation that measures the model does so."""
    probe_seq_len: int = Field(default=512, ge=2)
    """Tokens of such a window."""

    def targets(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        """The linears to compress. Raises `ConfigError` for a role that the model does not have."""
        return layout.select(self.roles)

    def groups(self, layout: ModelLayout) -> list[tuple[LinearRef, ...]]:
        """The targets, those with a joint basis together, in execution order."""
        span = self.truncation.span
        spans: dict[int, list[LinearRef]] = defaultdict(list)
        for ref in self.targets(layout):
            spans[ref.block // span].append(ref)
        return [group for refs in spans.values() for group in self.truncation.members(refs)]

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` where no ranks can meet the budget. Reads shapes, no weights."""
        if self.correction != "none" and self.truncation.span > 1:
            raise ConfigError(
                f"method.correction={self.correction} goes block by block: it needs a truncation of single blocks"
            )
        if self.scope == "role" and self.allocation.crosses_roles:
            raise ConfigError(
                f"method.scope=role cannot go with the allocation {self.allocation.kind}, which weighs roles against "
                "each other: use method.scope=global"
            )
        keep = self.allocation.keep
        keep.check(tuple(dict.fromkeys(ref.role for ref in self.targets(layout))), len(layout.blocks))
        flat = [Candidate(g[0].name, g, torch.ones(1, dtype=torch.float64)) for g in self.groups(layout)]
        # The influence of the blocks is not known yet: at most that floor.
        for rule, part, budget in self._budgets(layout, flat, max(self.floor, keep.influence)):
            options_of(part, budget)
            rule.check(part, budget)

    @property
    def probe(self) -> tuple[int, int] | None:
        """See `Compressor.probe`."""
        return (self.probe_windows, self.probe_seq_len) if self.allocation.needs_probe else None

    def check_tokens(self, layout: ModelLayout, tokens: int) -> None:
        """Raise `ConfigError` for fewer than a matrix's smaller side: its outputs would not be determined."""
        check_tokens(self.needs(), self.targets(layout), tokens)

    def needs(self) -> StatisticsRequest:
        """What the truncation and the spectra of the allocation need."""
        requests = [self.truncation.needs(), *(WHAT_SPECTRA_NEED[q] for q in sorted(self._extra_quantities()))]
        gradients = [r.gradient for r in requests if r.gradient is not None]
        return StatisticsRequest(
            moments=next((r.moments for r in requests if r.moments is not None), None),
            magnitudes=any(r.magnitudes for r in requests),
            gradient=reduce(GradientRequest.together_with, gradients) if gradients else None,
        )

    def reduction_key(self) -> dict[str, object]:
        """What the outcome of `reduce` depends on; neither ratio nor rule, so that a sweep decomposes once."""
        return {"truncation": self.truncation.model_dump(mode="json"), "spectra": sorted(self._extra_quantities())}

    def reduce(self, layers: Sequence[Layer]) -> Kept:
        """Decompose one group of linears; keep the projection and the spectra that the allocation reads."""
        projection = self.truncation.project(layers)
        kept = pack(projection)
        for quantity in self._extra_quantities():
            kept[f"spectrum_{quantity}"] = _spectrum(quantity, projection, layers)
        return kept

    def candidate(self, group: tuple[LinearRef, ...], kept: Kept) -> Candidate:
        """What the allocation sees of a group."""
        spectra = {q: kept[f"spectrum_{q}"] for q in self._extra_quantities()}
        if (implied := self._implied_quantity()) is not None:
            spectra[implied] = kept["values"]
        return Candidate(group[0].name, group, kept["values"], spectra)

    def plan(
        self,
        layout: ModelLayout,
        candidates: Sequence[Candidate],
        probe: Probe | None,
        influence: Float64[Tensor, " blocks"] | None = None,
    ) -> Plan:
        """Decide every rank, exactly within the budget.

        ``probe`` is for an allocation with ``needs_probe``, ``influence`` (of every block) for floors by it.
        """
        chosen = {c.name: c.full_rank for c in candidates}
        unspent = 0
        floors = self.allocation.keep.floors(influence)
        for rule, part, budget in self._budgets(layout, candidates, self.floor):
            left = budget.parameters + unspent
            # What the parts before could not spend may be more than this one can.
            budget = replace(budget, parameters=min(left, largest(part, budget)), block_floors=floors)
            chosen |= rule.ranks(part, budget, probe)
            unspent = left - sum(candidate.cost(chosen[candidate.name]) for candidate in part)
        ranks = {ref.name: ref.full_rank for ref in layout.linears}
        before = cost = sum(ref.out_features * ref.in_features for ref in layout.linears)
        for candidate in candidates:
            rank = chosen[candidate.name]
            cost += candidate.cost(rank) - candidate.dense_cost
            if rank < candidate.full_rank:
                ranks |= {ref.name: rank for ref in candidate.members}
        tails = {c.name: float(c.tail[chosen[c.name] :].sum()) for c in candidates}
        return Plan(self.name, ranks, tuple(range(len(layout.blocks))), before, cost, tails)

    def _budgets(
        self, layout: ModelLayout, candidates: Sequence[Candidate], floor: float
    ) -> Iterator[tuple[Allocation, list[Candidate], Budget]]:
        """The rules, the candidates that share a budget, and that budget: first what is held at the uniform rank.

        What is held dense is in none. Raises `ConfigError` where nothing is left to cut.
        """
        keep, total = self.allocation.keep, sum(ref.out_features * ref.in_features for ref in layout.linears)
        held: list[Candidate] = []
        free: list[Candidate] = []
        for candidate in candidates:
            (held if keep.holds(candidate.members, len(layout.blocks)) else free).append(candidate)
        if keep.at == "dense":
            if held and not free:
                raise ConfigError("method.allocation.keep holds every matrix dense: nothing is left to compress")
            held = []
        dense = sum(candidate.dense_cost for candidate in [*held, *free])
        left = self.budget(layout) - (total - dense)
        parts: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in free:
            parts[candidate.role if self.scope == "role" else ""].append(candidate)
        rules: list[tuple[Allocation, list[Candidate]]] = [(Uniform(), held)] if held else []
        before = 0
        for rule, part in [*rules, *((self.allocation, part) for part in parts.values())]:
            share = sum(candidate.dense_cost for candidate in part)
            elsewhere = (total - dense) * share // dense
            # Shares of the whole so far, so that rounding them down loses nothing of the sum.
            parameters = left * (before + share) // dense - left * before // dense
            before += share
            yield rule, part, Budget(parameters, self.rank_multiple, floor, self.dense, elsewhere=elsewhere)

    def _extra_quantities(self) -> set[Quantity]:
        """The spectra to compute beside the truncation's own."""
        return set(self.allocation.needs()) - {self._implied_quantity()}

    def _implied_quantity(self) -> Quantity | None:
        kinds: dict[str, Quantity] = {"optimal": "whitened", "plain": "weight", "two_sided": "two_sided"}
        return kinds.get(self.truncation.kind)


def pack(projection: Projection) -> Kept:
    """A projection as named tensors, its vectors in float32."""
    kept = {"values": projection.values, f"{projection.side}_expand": projection.expand.float()}
    if not torch.equal(projection.expand.T, projection.reduce):
        kept[f"{projection.side}_reduce"] = projection.reduce.float()
    return kept


def unpack(kept: Mapping[str, Tensor]) -> Projection:
    """The projection that `pack` made these tensors of."""
    side: Literal["output", "input"] = "output" if "output_expand" in kept else "input"
    expand = kept[f"{side}_expand"]
    return Projection(side, kept["values"], expand, kept.get(f"{side}_reduce", expand.T))


def _spectrum(quantity: Quantity, projection: Projection, layers: Sequence[Layer]) -> Tensor:
    if quantity == "change":
        return _first_order_changes(projection, layers)
    if quantity == "weight":
        stacked = torch.cat([layer.weight.detach().double() for layer in layers])
        return eigenvalues(stacked @ stacked.T if stacked.shape[0] <= stacked.shape[1] else stacked.T @ stacked)
    truncation = Optimal() if quantity == "whitened" else TwoSided()
    return torch.cat([truncation.project([layer]).values for layer in layers]).sort(descending=True).values


def _first_order_changes(projection: Projection, layers: Sequence[Layer]) -> Tensor:
    """`-<G, W_k>` for every component W_k of the truncation: its change of the mean loss when dropped."""
    changes = torch.zeros_like(projection.values)
    for layer in layers:
        gradient = layer.statistics.gradient
        assert gradient is not None
        assert gradient.mean is not None
        changes += drop_change(*projection.components(layer.weight), gradient.mean.double())
    return changes
