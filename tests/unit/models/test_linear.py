import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lowrank_kit.models.linear import is_transposed, set_weight, weight_of


@pytest.mark.parametrize("module", [torch.nn.Linear(5, 3), Conv1D(3, 5)])
def test_weight_is_out_by_in_and_gives_the_layers_output(module):
    x = torch.randn(4, 5)
    torch.testing.assert_close(x @ weight_of(module).T + module.bias, module(x))
    assert is_transposed(module) == isinstance(module, Conv1D)


@pytest.mark.parametrize("module", [torch.nn.Linear(5, 3), Conv1D(3, 5)])
def test_set_weight_changes_the_layer_in_place(module):
    parameter, weight, x = module.weight, torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 5)
    set_weight(module, weight)
    assert module.weight is parameter
    torch.testing.assert_close(module(x), x @ weight.float().T + module.bias)
