"""Bits beside ranks: one form and one rank for every matrix, by one multiplier over what both lose."""

from collections.abc import Sequence

from lowrank_kit.allocations.allocation import Budget, Candidate
from lowrank_kit.allocations.budget import Options, options_beside, saving_per_parameter
from lowrank_kit.allocations.knapsack import pareto, relax
from lowrank_kit.spectral.allocate import spend


def choose_forms(forms: Sequence[Sequence[Candidate]], budget: Budget) -> dict[str, tuple[Candidate, int]]:
    """The options of least total loss, as `Allocation.ranks_and_bits` has them.

    The solver sees the options of all forms of a matrix together: at every cost the one that loses least.
    """
    unrounded = [of_matrix[0] for of_matrix in forms]
    items, losses = [], []
    for of_matrix in forms:
        points = [
            (candidate, rank)
            for candidate, options in zip(of_matrix, options_beside(of_matrix, unrounded, budget), strict=True)
            for rank in options.ranks
        ]
        lost = [candidate.loss(rank) for candidate, rank in points]
        kept = pareto([candidate.cost(rank) for candidate, rank in points], lost)
        items.append([points[n] for n in kept])
        losses.append([lost[n] for n in kept])
    costs = [[candidate.cost(rank) for candidate, rank in item] for item in items]
    chosen = relax(costs, losses, budget.parameters).chosen
    options = [Options(tuple(rank for _, rank in item), tuple(c)) for item, c in zip(items, costs, strict=True)]
    # What the hulls left over goes to the steepest steps between their points.
    chosen = spend(chosen, costs, budget.parameters, saving_per_parameter(options, losses))
    return {c.name: item[index] for c, item, index in zip(unrounded, items, chosen, strict=True)}
