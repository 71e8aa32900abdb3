"""Compression by truncated SVD: any truncation (how a matrix is cut) with any allocation (who gets which rank).

The published methods are named pairs of the two, in ``conf/method/``; HiSVD, D-Rank, Swift-SVD, SVD-LLM and their
peers differ in nothing else.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float64
from pydantic import Field

from lowrank_kit.allocations.allocation import Allocation, Budget, Candidate, Probe
from lowrank_kit.allocations.budget import largest, options_of
from lowrank_kit.allocations.narrowing import Narrowing
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.backward import BACKWARD
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.compressors.probe import LossProbe
from lowrank_kit.corrections.correction import Correction, Factorisation
from lowrank_kit.corrections.none import Uncorrected
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.blocks import check_stand_alone
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.plan import Plan
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.plots.singular_values import plot_spectra
from lowrank_kit.storages.storage import Price, Storage
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.structures.none import RankAlone
from lowrank_kit.structures.structure import Structure
from lowrank_kit.truncations.decompose import Decomposition, Request, decompose
from lowrank_kit.truncations.truncation import Truncation, groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What the SVD family plans from: decomposed matrices, and every block's influence where floors are set by it."""

    decomposition: Decomposition
    influence: Float64[Tensor, " blocks"] | None

    @property
    def narrowings(self) -> list[Narrowing]:
        """The MLPs that the allocation may narrow instead."""
        found = self.decomposition
        return [Narrowing.of(units, found.eliminations[units.name]) for units in found.request.units]

    @property
    def candidates(self) -> list[Candidate]:
        """What the allocation sees."""
        found = self.decomposition
        return [
            Candidate(name, group, found.values[name], found.spectra[name], found.roundings[name])
            for group in found.groups
            for name in [group[0].name]
        ]


class TruncatedSVD(Compressor):
    """A truncation and an allocation under one exact budget."""

    factorises: ClassVar[bool] = True

    truncation: Truncation
    """How a matrix is cut: the metric of the approximation."""
    allocation: Allocation
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
    correction: Correction = Field(default=Uncorrected())
    """How the factors make up for the errors before them."""
    # Left out where it is what it always was, so that older run directories are found again.
    storage: Storage = Field(default=Factors(), exclude_if=lambda storage: storage == Factors())
    """How a low-rank matrix lies in the model, and what its rank costs: parameters, or bytes."""
    structure: Structure = Field(default=RankAlone(), exclude_if=lambda structure: structure.kind == "none")
    """What blocks may lose instead of rank."""

    def targets(self, layout: ModelLayout) -> tuple[LinearRef, ...]:
        """The linears to compress. Raises `ConfigError` for a role that the model does not have."""
        return layout.select(self.roles)

    def request(self, layout: ModelLayout) -> Request:
        """What to decompose. Neither ratio nor rule plays a part, so that a sweep decomposes once."""
        targets = self.targets(layout)
        return Request(
            self.truncation,
            self.allocation.needs(),
            targets,
            self.structure.units(layout, targets),
            tuple(self.storage.roundings.values()),
        )

    @property
    def rounds(self) -> bool:
        """See `Method`."""
        return bool(self.storage.roundings)

    @property
    def calibrates(self) -> bool:
        """Whether the truncation, a spectrum, a probe or a correction does."""
        needs = Request(self.truncation, self.allocation.needs(), ()).needs()
        reads = needs.reads_activations or needs.gradient is not None
        return reads or self.probe is not None or self.correction.kind != "none"

    @property
    def reads_gradients(self) -> bool:
        """Whether the truncation or a spectrum of the allocation does."""
        return Request(self.truncation, self.allocation.needs(), ()).needs().gradient is not None

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` where no ranks can meet the budget. Reads shapes, no weights."""
        self.truncation.check(layout)
        self.correction.check(self.truncation, self.targets(layout))
        self.structure.check(self.truncation, self.allocation)
        if self.storage.roundings:
            self._check_rounding(layout)
        units = self.structure.units(layout, self.targets(layout))
        if self.reads_gradients:
            check_stand_alone(layout, BACKWARD)
        if self.scope == "role" and (self.allocation.crosses_roles or units):
            weighing = f"structure={self.structure.kind}" if units else f"the allocation {self.allocation.kind}"
            raise ConfigError(
                f"method.scope=role cannot go with {weighing}, which weighs roles against each other: use "
                "method.scope=global"
            )
        keep = self.allocation.keep
        keep.check(tuple(dict.fromkeys(ref.role for ref in self.targets(layout))), len(layout.blocks))
        flat = [
            Candidate(g[0].name, g, torch.ones(1, dtype=torch.float64), price=self._price(layout))
            for g in groups_of(self.truncation, self.targets(layout))
        ]
        # The influence of the blocks is not known yet: at most that floor.
        for rule, part, budget in self._budgets(layout, flat, max(self.floor, keep.influence)):
            options_of(part, budget)
            rule.check(part, budget)

    def check_streamed(self) -> None:
        """See `Compressor`: refused are a probe, and bases that blocks share."""
        reasons = {
            f"the allocation {self.allocation.kind} measures the whole model": self.probe is not None,
            f"the truncation {self.truncation.kind} joins blocks": self.truncation.span > 1,
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ConfigError(
                f"runtime.weights=streamed has one block in memory at a time, and {reason}: use weights=resident"
            )

    @property
    def probe(self) -> tuple[int, int] | None:
        """See `Compressor.probe`."""
        return self.allocation.probe

    def calibrate(self, context: Context) -> Statistics:
        """Decompose every matrix; spectra and vectors go to the content-keyed cache, for every ratio to come."""
        model, samples = context.model, context.samples
        found = decompose(model, self.request(context.layout), samples, cache=context.cache, progress=context.progress)
        influence = None
        if self.allocation.keep.influence:
            influence = block_influence(model, samples, cache=context.cache, progress=context.progress)
        return Statistics(found, influence)

    def plan(self, statistics: Statistics, context: Context) -> Plan:
        """Decide every rank."""
        probe = None
        if context.probe_windows is not None:
            probe = LossProbe(context.model, statistics.decomposition, context.probe_windows, context.progress)
        plan = self.decide(
            context.layout, statistics.candidates, probe, statistics.influence, narrowings=statistics.narrowings
        )
        if starved := statistics.decomposition.starved:
            first, tokens = next(iter(starved.items()))
            log.warning(
                "%d matrices of experts saw fewer tokens than they have directions and are left dense, first %s (%d): "
                "more calibration.samples reach more of them", len(starved), first, tokens,
            )  # fmt: skip
        return replace(plan, starved=dict(starved))

    def apply(self, plan: Plan, statistics: Statistics, context: Context) -> "PreTrainedModel":
        """Factorise the planned matrices, in place."""
        found, samples = statistics.decomposition, context.samples
        work = Factorisation(context.model, plan, found, samples, context.unfinished, context.progress, self.storage)
        self.correction.factorise(work)
        return context.model

    def plot(self, plan: Plan, statistics: Statistics, context: Context, folder: Path) -> None:
        """Spectra and ranks."""
        linears = context.layout.linears
        singular = {name: values.sqrt().tolist() for name, values in statistics.decomposition.values.items()}
        plot_spectra(linears, singular, folder / "spectra.png", f"singular value ({self.truncation.kind})")
        plot_rank_map(linears, plan.ranks, self.storage, folder / "rank_map.png")
        plot_kept_ranks(linears, plan.ranks, folder / "kept_ranks.png")

    def decide(
        self,
        layout: ModelLayout,
        candidates: Sequence[Candidate],
        probe: Probe | None,
        influence: Float64[Tensor, " blocks"] | None = None,
        narrowings: Sequence[Narrowing] = (),
    ) -> Plan:
        """Decide every rank, and every matrix's bits, exactly within the budget, at the prices of `storage`.

        ``probe`` is for an allocation that measures the model, ``influence`` (of every block) for floors by it,
        ``narrowings`` are MLPs that the allocation may narrow instead of cutting all their matrices.
        """
        price, *rounded = self.storage.prices(layout.itemsize)
        candidates = [replace(candidate, price=price) for candidate in candidates]
        chosen = {c.name: c.full_rank for c in [*candidates, *narrowings]}
        standing = {candidate.name: candidate for candidate in candidates}
        unspent = 0
        floors = self.allocation.keep.floors(influence)
        for rule, part, budget in self._budgets(layout, candidates, self.floor):
            left = budget.parameters + unspent
            # What the parts before could not spend may be more than this one can.
            budget = replace(budget, parameters=min(left, largest(part, budget)), block_floors=floors)
            free = {candidate.name for candidate in part}
            narrowable = [n for n in narrowings if rule is self.allocation and {ref.name for ref in n.members} <= free]
            if rounded and rule is self.allocation:
                forms = [[c, *(replace(c, price=other) for other in rounded)] for c in part]
                found = rule.ranks_and_bits(forms, budget)
                standing |= {name: form for name, (form, _) in found.items()}
                chosen |= {name: rank for name, (_, rank) in found.items()}
            elif narrowable:
                chosen |= rule.ranks_or_channels(part, narrowable, budget, probe)
            else:
                chosen |= rule.ranks(part, budget, probe)
            unspent = left - sum(standing[c.name].cost(chosen[c.name]) for c in part)
            unspent += sum(n.dense_cost - n.cost(chosen[n.name]) for n in narrowable)
        ranks = {ref.name: ref.full_rank for ref in layout.linears}
        before = cost = layout.parameters
        for candidate in candidates:
            rank, counted = chosen[candidate.name], replace(candidate, price=self.storage)
            cost += counted.cost(rank) - counted.dense_cost
            if rank < candidate.full_rank:
                ranks |= {ref.name: rank for ref in candidate.members}
        kept = {}
        for n in narrowings:
            if (left := chosen[n.name]) < n.full_rank:
                cost += n.cost(left) - n.dense_cost
                ranks |= {ref.name: min(sides) for ref, *sides in n.units.sides(left)}
                kept[n.name] = n.elimination.kept(left)
        lost = {c.name: c.loss(chosen[c.name]) for c in [*standing.values(), *narrowings]}
        plan = Plan(self.name, ranks, tuple(range(len(layout.blocks))), before, cost, lost, kept)
        if not rounded:
            return plan
        bits = {name: c.price.rounding.bits for name, c in standing.items() if c.price.rounding is not None}
        whole = self._dense_cost(layout)
        left = whole + sum(standing[c.name].cost(chosen[c.name]) - c.dense_cost for c in candidates)
        return replace(plan, bits=bits, bytes_before=whole, bytes_after=left)

    def budget(self, layout: ModelLayout) -> int:
        """What may be left of the linears in the blocks: parameters, or bytes where weights may be rounded."""
        return self.left_of(self._dense_cost(layout))

    def _price(self, layout: ModelLayout) -> Price:
        """Of a matrix that is not rounded."""
        return self.storage.prices(layout.itemsize)[0]

    def _dense_cost(self, layout: ModelLayout) -> int:
        """Of all linears in the blocks."""
        price = self._price(layout)
        return sum(price.dense_cost(ref.out_features, ref.in_features) for ref in layout.linears)

    def _check_rounding(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for what does not go with weights of few bits."""
        reasons = {
            f"the allocation {self.allocation.kind} decides ranks alone: use allocation=lagrangian": (
                not self.allocation.chooses_bits
            ),
            f"the truncation {self.truncation.kind} does not say what rounding loses: use truncation=two_sided or "
            "truncation=optimal": not self.truncation.sees_rounding,
            f"method.structure={self.structure.kind} has no price in bytes: use structure=none": (
                self.structure.kind != "none"
            ),
            f"method.correction={self.correction.kind} trains weights: use correction=none or correction=residual": (
                self.correction.trains
            ),
            f"this {layout.model_type} has experts: leave method.storage.bits empty": any(
                ref.expert is not None for ref in self.targets(layout)
            ),
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ConfigError(f"method.storage.bits chooses ranks and bits together, and {reason}")

    def _budgets(
        self, layout: ModelLayout, candidates: Sequence[Candidate], floor: float
    ) -> Iterator[tuple[Allocation, list[Candidate], Budget]]:
        """The rules, the candidates that share a budget, and that budget: first what is held at the uniform rank.

        What is held dense is in none. Raises `ConfigError` where nothing is left to cut.
        """
        keep, total = self.allocation.keep, self._dense_cost(layout)
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
            unit = "bytes" if self.storage.roundings else "parameters"
            yield rule, part, Budget(parameters, self.rank_multiple, floor, self.dense, elsewhere=elsewhere, unit=unit)
