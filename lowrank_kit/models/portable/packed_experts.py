"""Experts as linears of their own, where transformers has one 3-D parameter for all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """The matrices of one expert; ``tokens`` are those that the last pass sent to it, by number in their list."""

    tokens: Tensor | None = None

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down


class ListedExperts(nn.Module):
    """Takes the place of a stock experts module, which keeps one matrix of all experts in one 3-D parameter.

    Here they are a list, called by number, of linears that can each be factored. Tokens go where they went.
    """

    num_experts: int
    act_fn: Any

    @torch.no_grad()
    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock_class = type(stock)
        # The stock class gates with its own settings and activation.
        self.__dict__.update({name: value for name, value in vars(stock).items() if not name.startswith("_")})
        for name, child in stock.named_children():
            self.add_module(name, child)
        # As [experts, in, out], whatever the family does.
        as_used = (lambda weight: weight) if is_transposed(stock) else (lambda weight: weight.mT)
        weights = (*_split(stock, as_used(stock.gate_up_proj)), as_used(stock.down_proj))
        biases: Any = (None, None, None)
        if hasattr(stock, "down_proj_bias"):
            biases = (*_split(stock, stock.gate_up_proj_bias), stock.down_proj_bias)
        for number in range(self.num_experts):
            parts = (_linear(w[number], None if b is None else b[number]) for w, b in zip(weights, biases, strict=True))
            self.add_module(str(number), Expert(*parts))

    def forward(self, hidden_states: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Map ``[tokens, hidden]`` to the same shape: the sum over the experts in ``index`` [tokens, k], weighted.

        Without ``index``, ``[experts * tokens, hidden]``: every expert has all tokens, those not sent to it as zeros.
        """
        if index is None or weights is None:
            return torch.cat([self._own(*part) for part in enumerate(hidden_states.chunk(self.num_experts))])
        outputs = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            expert: Any = self.get_submodule(str(number))
            expert.tokens, place = torch.where(index == number)
            if len(expert.tokens):
                output = self._run(expert, hidden_states[expert.tokens]) * weights[expert.tokens, place, None]
                outputs.index_add_(0, expert.tokens, output.to(outputs.dtype))
        return outputs

    def _own(self, number: int, hidden_states: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        [expert.tokens] = torch.where(hidden_states.any(-1))
        return torch.zeros_like(hidden_states).index_copy(
            0, expert.tokens, self._run(expert, hidden_states[expert.tokens])
        )

    def _run(self, expert: Any, states: Tensor) -> Tensor:
        gate, up = expert.gate(states), expert.up(states)
        gating = getattr(self.stock_class, "_apply_gate", None)
        found: Tensor = expert.down(up * self.act_fn(gate) if gating is None else gating(self, _join(self, gate, up)))
        return found

    def stock_weights(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stock module's parameters, of the experts' dense ones; both by their names in the module."""

        def stacked(matrix: str, part: str) -> Tensor:
            return torch.stack([dense[f"{number}.{matrix}.{part}"] for number in range(self.num_experts)])

        gate, up, down = (stacked(matrix, "weight").mT for matrix in ("gate", "up", "down"))
        gate_up = _join(self, gate, up)
        if not is_transposed(self):
            gate_up, down = gate_up.mT, down.mT
        found = {"gate_up_proj": gate_up.contiguous(), "down_proj": down.contiguous()}
        if "0.down.bias" in dense:
            found["gate_up_proj_bias"] = _join(self, stacked("gate", "bias"), stacked("up", "bias"))
            found["down_proj_bias"] = stacked("down", "bias")
        return found


def is_transposed(experts: Any) -> bool:
    """Whether an experts module keeps its matrices as ``[experts, in, out]``; Llama 4's does and does not say it."""
    return getattr(experts, "is_transposed", True)


def _join(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    """``[..., n]`` twice as ``[..., 2n]``: one behind the other, or in turn."""
    if getattr(experts, "is_concatenated", True):
        return torch.cat((gate, up), -1)
    return torch.stack((gate, up), -1).flatten(-2)


def _split(experts: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_join`."""
    if getattr(experts, "is_concatenated", True):
        gate, up = gate_up.chunk(2, -1)
        return gate, up
    return gate_up[..., ::2], gate_up[..., 1::2]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear of its own with this weight [in, out]."""
    in_features, out_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight.T)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
