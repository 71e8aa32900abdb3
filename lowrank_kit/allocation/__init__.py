"""Who gets which rank: one file of mathematics a rule, any of them with any truncation.

A rule reads `Candidate`s (shapes and spectra), never weights, and meets a `Budget` of parameters exactly.
"""

from typing import Annotated

from pydantic import Field

from lowrank_kit.allocation.asvd import Strs
from lowrank_kit.allocation.d_rank import DRank
from lowrank_kit.allocation.energy_svd import EnergySvd
from lowrank_kit.allocation.hisvd import HiSvd
from lowrank_kit.allocation.lagrangian import Lagrangian
from lowrank_kit.allocation.loss import Loss
from lowrank_kit.allocation.svd_llm_v2 import SvdLlmV2
from lowrank_kit.allocation.swift import Swift
from lowrank_kit.allocation.uniform import Uniform
from lowrank_kit.allocation.zs_svd import ZeroSum

AnyAllocation = Annotated[
    Uniform | SvdLlmV2 | DRank | Swift | HiSvd | EnergySvd | ZeroSum | Strs | Lagrangian | Loss,
    Field(discriminator="kind"),
]
"""A rule chosen by `kind`."""
