"""Two processes with half of every matrix each compute what one does."""

import pytest
import torch
import warm

from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import units_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

IDS = torch.arange(3, 27).reshape(2, 12)
PARALLEL = """
import os, sys, torch
import lowrank_kit
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
expected = torch.load("expected.pt")
for name, logits in expected["logits"].items():
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(tp_size=2))
    split = {n.partition("layers.")[2].partition(".")[2] for n, p in model.named_parameters()
             if isinstance(p, DTensor) and not all(place.is_replicate() for place in p.placements)}
    with torch.no_grad():
        found = model(expected["ids"]).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-6, msg=name)
    assert expected["split"][name] <= split, (name, expected["split"][name] - split)
try:
    AutoModelForCausalLM.from_pretrained("one head", distributed_config=DistributedConfig(tp_size=2))
    raise SystemExit("a head was cut")
except ValueError as error:
    assert str(error) == (
        "tensor parallelism over 2 devices would cut heads of attention: model.layers.0.self_attn.k_proj has 1; "
        "numbers of devices that divide the heads of all layers: 1"), error
torch.distributed.destroy_process_group()
"""


def factored(model, storage, *roles, blocks=range(3)):
    draw = torch.Generator().manual_seed(0)
    for ref in layout_of(model).linears:
        if ref.block in blocks and ref.role in roles:
            up, down = (torch.randn(*s, generator=draw) / 5 for s in ((ref.out_features, 6), (6, ref.in_features)))
            storage.put(model, [ref.name], LowRankFactors(up, down))
    return model


def listed(model):
    list_experts(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("parallel")
    everything = ("q", "k", "v", "o", "gate", "up", "down")
    models = {
        "factored": factored(tiny_model("llama"), Factors(), *everything),
        # The same roles dense in one block and factored in another; rows by their number where inputs are split.
        "mixed": factored(factored(tiny_model("qwen3"), Factors(), "q", "gate", "o", blocks=(0,)), Pivot(), "down"),
        # Whole in every process: outputs by pivot rows are in no order, and experts that are factored in a list.
        "pivots": factored(tiny_model("llama"), Pivot(), "q", "up"),
        "experts": factored(listed(tiny_model("mixtral")), Factors(), "expert_up", "q"),
    }
    split = {
        "factored": {"self_attn.q_proj.up.weight", "self_attn.o_proj.down.weight", "mlp.down_proj.down.weight"},
        "mixed": {"self_attn.q_proj.up.weight", "self_attn.q_proj.weight", "mlp.down_proj.down.weight"},
        "pivots": set(),
        "experts": set(),
    }
    for name, model in models.items():
        save_compressed(model, root / name)
    # One of two heads of keys is left in the first block.
    narrow = tiny_model("llama")
    [heads] = (units for units in units_of(layout_of(narrow), [0]) if units.kind == "heads")
    keep_units(narrow, heads, [1])
    save_compressed(narrow, root / "one head")
    with torch.no_grad():
        logits = {name: model(IDS).logits for name, model in models.items()}
    torch.save({"ids": IDS, "logits": logits, "split": split}, root / "expected.pt")
    return root


def in_two(script, folder, environment):
    (folder / "parallel.py").write_text(script)
    return warm.run_in_two(["parallel.py"], environment, folder)


def test_two_processes_compute_what_one_does(saved, environment):
    done = in_two(PARALLEL, saved, environment)
    assert done.returncode == 0, done.stderr[-4000:]
