"""`method.allocation.keep`: what no rule decides, for every rule, under a budget that stays exact."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_kit.allocations.allocation import Allocation, Candidate
from lowrank_kit.allocations.asvd import Strs
from lowrank_kit.allocations.keep import Keep
from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.truncations.optimal import Optimal

SHAPES = {"q": (24, 24), "k": (8, 24), "v": (8, 24), "o": (24, 24), "gate": (40, 24), "down": (24, 40)}
BLOCKS = 4
RULES = [rule for rule in Allocation.known.values() if rule is not Strs]


def layout_of(shapes, blocks):
    refs = tuple(
        LinearRef(f"{block}.{role}", block, role, width, out, False, f"{block}.{role}")
        for block in range(blocks)
        for role, (out, width) in shapes.items()
    )
    names = tuple(str(block) for block in range(blocks))
    return ModelLayout("llama", (names,), names, refs, "embed", None, None, (), 8)


LAYOUT = layout_of(SHAPES, BLOCKS)


def candidates(seed, layout=LAYOUT):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ref in layout.linears:
        scale, power = torch.rand(2, generator=generator).tolist()
        tail = scale * torch.arange(1, ref.full_rank + 1, dtype=torch.float64) ** -(3 * power)
        sign = torch.randn(ref.full_rank, generator=generator, dtype=torch.float64)
        spectra = {"weight": tail, "whitened": tail, "two_sided": tail, "change": tail * sign}
        found.append(Candidate(ref.name, (ref,), tail, spectra))
    return found


class Probe:
    def divergence(self, ranks):
        return self.loss_change(ranks)

    def loss_change(self, ranks):
        return sum(1 / rank for rank in ranks.values())


def method(allocation, **fixed):
    return TruncatedSVD(**({"name": "x", "truncation": Optimal(), "rank_multiple": 1} | fixed), allocation=allocation)


def size(ref):
    return ref.out_features * ref.in_features


def cost(plan):
    total = 0
    for ref in LAYOUT.linears:
        rank = plan.ranks[ref.name]
        total += size(ref) if rank == ref.full_rank else rank * (ref.out_features + ref.in_features)
    return total


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule().kind)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    blocks=st.lists(st.integers(-BLOCKS, BLOCKS - 1), max_size=2),
    roles=st.lists(st.sampled_from(sorted(SHAPES)), max_size=2, unique=True),
    at=st.sampled_from(["uniform", "dense"]),
    influence=st.sampled_from([0.0, 0.5, 1.0]),
    ratio=st.floats(0.15, 0.6),
    dense=st.booleans(),
    scope=st.sampled_from(["global", "role"]),
)
def test_every_rule_leaves_alone_what_is_kept_and_meets_its_budget(
    rule, seed, blocks, roles, at, influence, ratio, dense, scope
):
    keep = Keep(blocks=tuple(blocks), roles=tuple(roles), at=at, influence=influence)
    svd = method(rule(keep=keep), ratio=ratio, dense=dense, scope="global" if rule.crosses_roles else scope)
    try:
        svd.check(LAYOUT)
    except ConfigError as error:
        assert re.search("nearest feasible|every matrix dense", str(error))  # noqa: PT017
        return
    of_blocks = torch.rand(BLOCKS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = svd.decide(LAYOUT, candidates(seed), Probe(), of_blocks if influence else None)
    assert cost(plan) == plan.parameters_after <= svd.budget(LAYOUT)
    held = [r for r in LAYOUT.linears if r.role in roles or r.block in {b % BLOCKS for b in blocks}]
    kept = svd.budget(LAYOUT) / sum(map(size, LAYOUT.linears))
    for ref in held:
        uniform = kept * size(ref) / (ref.out_features + ref.in_features)
        if at == "dense":
            assert plan.ranks[ref.name] == ref.full_rank
        else:
            # To the rank, but for the cap: no rank costs more than the dense matrix.
            assert plan.ranks[ref.name] >= min(int(uniform), ref.full_rank - 1) or uniform < 1
    free = [r for r in LAYOUT.linears if r not in held]
    if scope == "global" or rule.crosses_roles:
        left = svd.budget(LAYOUT) - plan.parameters_after
        steps = [
            r.out_features + r.in_features
            for r in free
            if (plan.ranks[r.name] + 1) * (r.out_features + r.in_features) < size(r)
        ]
        assert all(step > left for step in steps)
    if influence:
        budget_of_free = svd.budget(LAYOUT) - sum(
            size(r) if plan.ranks[r.name] == r.full_rank else plan.ranks[r.name] * (r.out_features + r.in_features)
            for r in held
        )
        share = budget_of_free / max(sum(map(size, free)), 1)
        for ref in free:
            floor = influence * float(of_blocks[ref.block] / of_blocks.max()) * share
            # Ranks below the floor's, rounded down; a held remainder may have moved the uniform rank by one.
            least = int(floor * size(ref) / (ref.out_features + ref.in_features)) - 1
            assert plan.ranks[ref.name] >= least


def test_block_zero_uniform_by_hand():
    # At 0.5: q, o 6 of 12 ranks; k, v 3 of 6; gate, down 7.5 of 15. Without `keep`, all energy being elsewhere, block 0
    # would have one rank a matrix.
    found = [Candidate(c.name, c.members, c.tail * (1e-12 if c.block == 0 else 1.0), c.spectra) for c in candidates(0)]
    starved = method(Lagrangian(), ratio=0.5).decide(LAYOUT, found, None).ranks
    assert [starved[f"0.{role}"] for role in SHAPES] == [1] * 6
    ranks = method(Lagrangian(keep=Keep(blocks=(0,))), ratio=0.5).decide(LAYOUT, found, None).ranks
    assert [ranks[f"0.{role}"] for role in ("q", "k", "v", "o")] == [6, 3, 3, 6]
    assert {ranks["0.gate"], ranks["0.down"]} <= {7, 8}


def test_the_last_block_may_be_named_from_the_end():
    both = [method(Uniform(keep=Keep(blocks=(b,), at="dense"))).decide(LAYOUT, candidates(0), None) for b in (-1, 3)]
    assert both[0].ranks == both[1].ranks
    assert both[0].ranks["3.q"] == 24


def test_a_floor_by_influence_is_a_share_of_the_uniform_rank():
    # Influences 1 : 1/2 : 0 : 1/4 of the largest, at half of them: q's uniform rank 6 gives floors 3, 1, none, none.
    found = [Candidate(c.name, c.members, c.tail * 1e-12 ** (c.block < 2), c.spectra) for c in candidates(0)]
    svd = method(Lagrangian(keep=Keep(influence=0.5)), ratio=0.5)
    ranks = svd.decide(LAYOUT, found, None, torch.tensor([0.8, 0.4, 0.0, 0.2], dtype=torch.float64)).ranks
    assert (ranks["0.q"], ranks["0.o"], ranks["1.q"], ranks["0.gate"]) == (3, 3, 1, 3)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (Keep(blocks=(4,)), r"keep\.blocks=4: the model has 4 blocks; legal: -4 to 3"),
        (Keep(blocks=(-5,)), r"keep\.blocks=-5: the model has 4 blocks"),
        (Keep(roles=("gat",)), r"keep\.roles: no linear of role 'gat' is compressed; did you mean 'gate'\?"),
        (
            Keep(roles=("k", "v"), blocks=(0, 1, 2), at="dense"),
            r"too small: .* nearest feasible: \d+ parameters, ratio",
        ),
        (Keep(blocks=(0, 1, 2, 3), at="dense"), "every matrix dense: nothing is left to compress"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_a_model_is_loaded(keep, message):
    svd = method(Uniform(keep=keep), ratio=0.5)
    with pytest.raises(ConfigError, match=message):
        svd.check(LAYOUT)


def test_the_nearest_feasible_ratio_is_feasible():
    keep = Keep(blocks=(0, 1, 2), at="dense")
    with pytest.raises(ConfigError, match="nearest feasible") as caught:
        method(Uniform(keep=keep), ratio=0.5).check(LAYOUT)
    ratio = float(str(caught.value).rsplit(" ", 1)[1])
    method(Uniform(keep=keep), ratio=ratio - 1e-4).check(LAYOUT)
    with pytest.raises(ConfigError):
        method(Uniform(keep=keep), ratio=ratio + 1e-3).check(LAYOUT)
