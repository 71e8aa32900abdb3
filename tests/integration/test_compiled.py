"""Compilers take compressed models whole: no graph break, one graph for every length, an exported programme."""

import pytest
import torch
from changed import IDS, factored, sliced
from transformers import AutoModelForCausalLM

from lowrank_kit.models.checkpoint import save_compressed


@pytest.fixture(params=["factored", "sliced"])
def loaded(request, tiny_model, tmp_path):
    save_compressed({"factored": factored, "sliced": sliced}[request.param](tiny_model("llama")), tmp_path / "saved")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()


@torch.no_grad()
def test_one_graph_without_a_break_serves_every_length(loaded):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend=backend, fullgraph=True, dynamic=True)
    for length in (12, 7, 5, 9):
        ids = IDS[:, :length].clone()
        found = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, loaded(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)
    assert len(graphs) == 1


@torch.no_grad()
def test_an_exported_programme_computes_the_same(loaded):
    length = torch.export.Dim("length", min=2, max=64)
    given = {"input_ids": IDS, "use_cache": False}
    program = torch.export.export(loaded, (), given, dynamic_shapes={"input_ids": {1: length}, "use_cache": None})
    for count in (12, 5):
        ids = IDS[:, :count].clone()
        found = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, loaded(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)
