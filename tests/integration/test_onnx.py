"""ONNX by torch's own exporter, run by ONNX Runtime: the logits of transformers, for every batch and length.

Where both are installed (`pip install onnxscript onnxruntime`).
"""

import pytest
import torch
from changed import IDS, factored, narrowed, sliced
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_kit.models.checkpoint import save_compressed

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


class Logits(nn.Module):
    """What is exported: tokens in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


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
