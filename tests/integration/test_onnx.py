"""ONNX by torch's own exporter, run by ONNX Runtime: the logits of transformers, for every batch and length.

Where both are installed (`pip install onnxscript onnxruntime`).
"""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.slicegpt import slice_model
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import units_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

IDS = torch.arange(3, 27).reshape(2, 12)


class Logits(nn.Module):
    """What is exported: tokens in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def factored(model):
    draw = torch.Generator().manual_seed(0)
    for ref in layout_of(model).linears:
        if ref.block < 2:
            up, down = (torch.randn(*s, generator=draw) / 5 for s in ((ref.out_features, 6), (6, ref.in_features)))
            (Pivot() if ref.block else Factors()).put(model, [ref.name], LowRankFactors(up, down))
    return model


def narrowed(model):
    for units in units_of(layout_of(model), (0, 2)):
        keep_units(model, units, [1] if units.kind == "heads" else range(units.block, 48, 3))
    return model


def sliced(model):
    slice_model(model, CalibrationSamples(tuple({"input_ids": row} for row in IDS), batch_size=2), 20)
    return model


# What torch's exporter says of itself.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [factored, narrowed, sliced])
@torch.no_grad()
def test_onnx_runtime_computes_the_same_logits(change, tiny_model, tmp_path):
    save_compressed(change(tiny_model("llama")), tmp_path / "saved")
    model = Logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).eval()
    shapes = {"input_ids": {0: "batch", 1: "length"}}
    torch.onnx.export(model, (IDS,), dynamo=True, dynamic_shapes=shapes).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for ids in (IDS, IDS[:1, :5], IDS[:, :7]):
        [found] = session.run(None, {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(ids), rtol=0, atol=1e-5)
