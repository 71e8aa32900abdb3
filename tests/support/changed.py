"""A tiny model of three blocks, changed as methods change it: what compilers, exporters and servers have to take."""

import torch

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.slicegpt import slice_model
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import units_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

IDS = torch.arange(3, 27).reshape(2, 12)


def factored(model):
    """Two factors in the first block, pivot rows in the second, the third dense."""
    draw = torch.Generator().manual_seed(0)
    for ref in layout_of(model).linears:
        if ref.block < 2:
            up, down = (torch.randn(*s, generator=draw) / 5 for s in ((ref.out_features, 6), (6, ref.in_features)))
            (Pivot() if ref.block else Factors()).put(model, [ref.name], LowRankFactors(up, down))
    return model


def narrowed(model):
    """Irregular over the blocks: the first keeps other channels than the last, and the second is whole."""
    for units in units_of(layout_of(model), (0, 2)):
        keep_units(model, units, [1] if units.kind == "heads" else range(units.block, 48, 3))
    return model


def sliced(model):
    """A narrower residual stream."""
    slice_model(model, CalibrationSamples(tuple({"input_ids": row} for row in IDS), batch_size=2), 20)
    return model
