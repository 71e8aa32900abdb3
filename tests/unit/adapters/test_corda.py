"""CorDA on moments that are hard; that it is PEFT's is tested in test_peft_methods.py."""

import pytest
import torch

from lowrank_kit.adapters.corda import Corda
from lowrank_kit.calibration.statistics import LayerStatistics
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.moments import SampleMoments

RANK, SIZE = 4, 96
REF = LinearRef("block.linear", 0, "q", SIZE, 24, False, "block:q")


def statistics(samples):
    moments = SampleMoments.zeros(SIZE)
    for sample in samples:
        moments.update(sample)
    return LayerStatistics(REF, "input", moments)


@pytest.mark.parametrize("massive", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_components_are_right_where_one_channel_dwarfs_the_others(mode, massive):
    """W (sum of the chosen components) is W C (V V^T) C^-1, which a QR of the transposed product gives, too."""
    draw = torch.Generator().manual_seed(0)
    samples = torch.randn(6, 200, SIZE, generator=draw, dtype=torch.float64)
    samples[:, :, 7] += massive
    weight = torch.randn(24, SIZE, generator=draw, dtype=torch.float64) / 20
    method = Corda(name="corda", rank=RANK, mode=mode)
    kept = method.reduce(weight, None, statistics(samples))
    found = method.initialise(weight, kept, RANK)

    scaled = [sample / sample.max().abs() for sample in samples]
    second = sum(sample.T @ sample for sample in scaled) / len(scaled)
    second += 0.01 * second.diagonal().mean() * torch.eye(SIZE, dtype=torch.float64)
    _, triangle = torch.linalg.qr((weight @ second).T)
    left, _, _ = torch.linalg.svd(triangle.T)
    left = left[:, -RANK:] if mode == "kpm" else left[:, :RANK]
    expected = left @ left.T @ weight
    assert (found.up @ found.down - expected).norm() <= 1e-5 * expected.norm()


def test_a_linear_that_no_sample_reaches_is_named():
    with pytest.raises(LowRankKitError, match=r"no calibration sample reaches block\.linear: raise .* \(q\) out of"):
        Corda(name="corda", rank=RANK).reduce(torch.zeros(24, SIZE), None, statistics([]))
