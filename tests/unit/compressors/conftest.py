from collections.abc import Callable

import pytest
import torch

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.optimal import Optimal


@pytest.fixture
def samples() -> CalibrationSamples:
    ids = torch.randint(3, 64, (6, 30), generator=torch.Generator().manual_seed(0))
    return CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=2)


@pytest.fixture
def method() -> Callable[..., TruncatedSVD]:
    def build(**settings: object) -> TruncatedSVD:
        fixed = {"name": "svd_llm", "truncation": Optimal(), "allocation": Uniform(), "rank_multiple": 1, "ratio": 0.4}
        return TruncatedSVD(**(fixed | settings))

    return build
