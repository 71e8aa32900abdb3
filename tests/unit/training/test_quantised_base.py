"""Adapters on a base that bitsandbytes has quantised."""

import pytest
import torch
from torch import nn

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.mica import Mica
from lowrank_kit.adapters.milora import Milora
from lowrank_kit.adapters.pissa import Pissa
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import dense_weight


class Packed(nn.Linear):
    """As bitsandbytes stores 4 bits: two weights a byte, in one column."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        packed = torch.zeros(dense.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.fixture
def packed(tiny_model):
    model = tiny_model("llama")
    for ref in layout_of(model).linears:
        model.set_submodule(ref.name, Packed(model.get_submodule(ref.name)))
    return layout_of(model)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (Astra(name="astra"), "set method.base=untouched"),
        (Milora(name="milora"), "set method.base=untouched"),
        (Pissa(name="pissa"), "method=lora, dora"),
        (Mica(name="mica"), "method=lora, dora"),
        (FullFineTuning(name="full_ft"), "choose an adapter"),
    ],
)
def test_a_method_that_changes_or_decomposes_weights_refuses_packed_ones(packed, method, advice):
    with pytest.raises(ConfigError, match=rf"layers\.0\..*q_proj is quantised.*{advice}"):
        method.check(packed)


@pytest.mark.parametrize("method", [Lora(name="lora"), Dora(name="dora"), Astra(name="astra", base="untouched")])
def test_a_method_that_leaves_the_base_alone_takes_them(packed, method):
    method.check(packed)
    assert len(packed.linears) == 21


def test_compression_starts_from_the_original(packed):
    with pytest.raises(ConfigError, match="is quantised: 21 of 21 linears"):
        packed.select()


def test_packed_weights_cannot_be_read_on_a_cpu():
    with pytest.raises(LowRankKitError, match=r"quantised weights on a CPU"):
        dense_weight(Packed(nn.Linear(8, 8)))
