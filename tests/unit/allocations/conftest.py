import pytest
import torch

from lowrank_kit.allocations.allocation import Candidate
from lowrank_kit.models.architectures import Role, roles
from lowrank_kit.models.layout import LinearRef

SMOLLM2 = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
ROLES = {role.name: role for role in vars(roles).values() if isinstance(role, Role)}


@pytest.fixture(scope="session")
def make():
    def make(role, block, shape, tail, members=1, **spectra):
        out, width = shape
        known = ROLES[role]
        refs = tuple(
            LinearRef(
                f"layers.{block + i}.{role}", block + i, role, width, out, False, f"{block + i}:{role}",
                kind=known.kind, product=known.product,
            )
            for i in range(members)
        )  # fmt: skip
        spectra = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in spectra.items()}
        return Candidate(refs[0].name, refs, torch.as_tensor(tail, dtype=torch.float64), spectra)

    return make


@pytest.fixture(scope="session")
def all_spectra():
    """What any rule asks for, made from the tail."""

    def all_spectra(tail, generator):
        sign = torch.randn(len(tail), generator=generator, dtype=torch.float64)
        return {
            "weight": tail.sqrt(),
            "whitened": tail,
            "two_sided": tail**1.5,
            "change": tail * sign,
        }

    return all_spectra


@pytest.fixture(scope="session")
def smollm2(make, all_spectra):
    generator = torch.Generator().manual_seed(0)
    candidates = []
    for block in range(30):
        for role, shape in SMOLLM2.items():
            scale, power = torch.rand(2, generator=generator).tolist()
            tail = 10 * scale * torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -(0.5 + 2 * power)
            candidates.append(make(role, block, shape, tail, **all_spectra(tail, generator)))
    return candidates


@pytest.fixture(scope="session")
def tails_probe():
    """A model whose loss is a known function of the truncations."""

    class TailsProbe:
        def __init__(self, candidates, factor=lambda candidate: 1.0):
            self.by_name, self.factor, self.asked = {c.name: c for c in candidates}, factor, []

        def divergence(self, ranks):
            return self.loss_change(ranks)

        def loss_change(self, ranks):
            self.asked.append(dict(ranks))
            return sum(self.loss(self.by_name[name], rank) for name, rank in ranks.items())

        def loss(self, candidate, rank):
            dropped = 0.0 if rank == candidate.full_rank else float(candidate.tail[rank:].sum())
            return self.factor(candidate) * dropped

    return TailsProbe
