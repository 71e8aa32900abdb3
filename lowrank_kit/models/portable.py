"""What a compressed model is made of. Copied whole into every checkpoint: imports torch and transformers only."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


class LowRankLinear(nn.Module):
    """``y = up(down(x))``: a rank-r weight ``up.weight @ down.weight`` that is never multiplied out.

    Both halves are plain ``nn.Linear``, so that quantisers and PEFT find layers they know; ``up`` carries the
    bias. There is no ``weight``: code that needs one fails instead of reading half of it.
    """

    pivot_rows: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LowRankLinear":
        """Copy ``up`` [out, r], ``down`` [r, in] and ``bias`` [out] into a new layer, as they are or as told."""
        device, dtype = device or up.device, dtype or up.dtype
        layer = cls(down.shape[1], up.shape[0], up.shape[1], bias is not None, device=device, dtype=dtype)
        layer.down.weight.copy_(down)
        layer.up.weight.copy_(up)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]`` by ``rank * (in + out)`` multiplications a token."""
        return self.up(self.down(x))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Multiply the factors out: ``[out, in]`` in float64."""
        return self.up.weight.double() @ self.down.weight.double()

    def dense_bias(self) -> Tensor | None:
        """The bias of the product, ``[out]``."""
        return self.up.bias

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(LowRankLinear):
    """The same product by rows of it: ``y = [down(x), up(down(x))][index] + bias``.

    ``down.weight`` are rows that span all others, ``pivot_rows`` of which are rows of this matrix (all ``rank``, unless
    several matrices have one ``down``); ``up.weight`` has the coefficients of its other rows. PIFA, arXiv 2501.19090.
    """

    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        pivot_rows: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features - pivot_rows, rank, device=device, dtype=dtype)
        self.out_features, self.pivot_rows = out_features, pivot_rows
        self.bias: Any = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("index", torch.arange(out_features, device=device, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def from_pivots(
        cls,
        rows: Tensor,
        coefficients: Tensor,
        index: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "PivotLinear":
        """Copy ``rows`` [k, in], ``coefficients`` [rest, k], ``index`` [out] and ``bias`` [out] into a new layer."""
        (rank, in_features), rest, out_features = rows.shape, len(coefficients), len(index)
        device, dtype = device or rows.device, dtype or rows.dtype
        layer = cls(in_features, out_features, rank, out_features - rest, bias is not None, device, dtype)
        layer.down.weight.copy_(rows)
        layer.up.weight.copy_(coefficients)
        layer.index.copy_(index)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]`` by ``rank * (in + out - pivot_rows)`` multiplications a token."""
        pivots = self.down(x)
        outputs = torch.cat((pivots, self.up(pivots)), -1).index_select(-1, self.index)
        return outputs if self.bias is None else outputs + self.bias

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Multiply out and put in order: ``[out, in]`` in float64."""
        rows = self.down.weight.double()
        return torch.cat((rows, self.up.weight.double() @ rows))[self.index]

    def dense_bias(self) -> Tensor | None:
        """The bias of the product, ``[out]``."""
        return self.bias


class RoundedLinear(nn.Module):
    """A linear whose weight is whole numbers of ``bits`` bits times a scale for every ``group`` inputs (0: for all).

    ``codes`` are int8 ``[out, in]``, or, two to a byte with the first in the lower half, uint8 ``[out, ceil(in / 2)]``;
    ``scale`` is ``[out, groups]``. They are buffers: nothing of the weight is trained. It is multiplied out for every
    pass, in the number format of the scales.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        width, groups = -(-in_features * bits // 8), -(-in_features // group) if group else 1
        integer = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, width, device=device, dtype=integer))
        self.register_buffer("scale", torch.ones(out_features, groups, device=device, dtype=dtype))
        self.bias: Any = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes: Tensor, scale: Tensor, bits: int, group: int, bias: Tensor | None = None
    ) -> "RoundedLinear":
        """Pack ``codes`` [out, in], int8 in any case, into a new layer with ``scale`` and a copy of ``bias``."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, bits, group, bias is not None, scale.device, scale.dtype)
        if bits == 4:
            low, high = nn.functional.pad(codes, (0, in_features % 2)).unflatten(1, (-1, 2)).unbind(-1)
            codes = (low & 15 | high << 4).view(torch.uint8)
        layer.codes.copy_(codes)
        layer.scale.copy_(scale)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, ``[out, in]``."""
        codes = self.codes
        if self.bits == 4:
            # The shift of a signed byte keeps the sign.
            packed = codes.view(torch.int8)
            codes = torch.stack((packed << 4 >> 4, packed >> 4), -1).flatten(1)[:, : self.in_features]
        weight = codes.to(self.scale.dtype)
        if not self.group:
            return weight * self.scale
        return weight * self.scale.repeat_interleave(self.group, 1)[:, : self.in_features]

    def dense_weight(self) -> Tensor:
        """The weight, in float64."""
        return self.weight.double()

    def dense_bias(self) -> Tensor | None:
        """The bias, ``[out]``."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*tokens, in]`` to ``[*tokens, out]``."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


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


class SlicedLayer(nn.Module):
    """Goes before a stock pre-norm decoder layer: its residuals pass a matrix from one rotated basis to the next.

    SliceGPT, section 3.4 (arXiv 2401.15024). `add_shortcuts` makes one of a stock layer.
    """

    attention_shortcut: nn.Linear
    mlp_shortcut: nn.Linear
    mlp: nn.Module
    self_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """Map ``[rows, tokens, hidden]`` to the same shape, in the next layer's basis."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


@cache
def _sliced_class(stock: Any) -> Any:
    return type(f"Sliced{stock.__name__}", (SlicedLayer, stock), {"__module__": __name__})


def add_shortcuts(layer: Any) -> None:
    """Give a decoder layer of the Llama kind its two shortcuts, not yet filled, of the width of its norms."""
    layer.__class__ = _sliced_class(layer.__class__)
    weight = layer.input_layernorm.weight
    width, options = weight.shape[0], {"bias": False, "device": weight.device, "dtype": weight.dtype}
    layer.attention_shortcut = nn.Linear(width, width, **options)
    layer.mlp_shortcut = nn.Linear(width, width, **options)


class LowRankModel(PreTrainedModel):
    """Goes before a stock model class: its linears take their compressed form, before any weight is loaded.

    ``config.lowrank`` holds ``ranks``, the rank of every factored linear by module path; ``shared_down``, the
    linears whose ``down`` weight is another one's (one parameter, stored once); where there are any, ``pivot_rows``,
    that number of those that are `PivotLinear`, ``rounded``, bits and group of the linears, or halves of factored ones,
    that are `RoundedLinear`, ``experts``, the modules that are `ListedExperts`, ``shapes`` ``[out, in]`` of the linears
    that are narrower than the stock ones, and ``shortcuts``, the decoder layers that are `SlicedLayer`. Raises
    `ValueError`, with the entry, where they describe no such model.
    """

    _tied_weights_keys: dict[str, str] | None
    _shared_down: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        lowrank = _checked(config.lowrank)
        for name in lowrank["experts"]:
            self._stock(name, "experts", nn.Module)
            self.set_submodule(name, ListedExperts(self.get_submodule(name)))
        for name, (out_features, in_features) in lowrank["shapes"].items():
            stock = self._stock(name, "shapes", (nn.Linear, Conv1D))
            options = {"bias": stock.bias is not None, "device": stock.weight.device, "dtype": stock.weight.dtype}
            self.set_submodule(name, nn.Linear(in_features, out_features, **options))
        for name in lowrank["shortcuts"]:
            self._stock(f"{name}.input_layernorm", "shortcuts", nn.Module)
            add_shortcuts(self.get_submodule(name))
        for name, rank in lowrank["ranks"].items():
            dense = self._stock(name, "ranks", (nn.Linear, Conv1D))
            weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
            out_features, in_features = weight.shape
            if rank > min(weight.shape):
                raise ValueError(f"lowrank.ranks: {rank} is no rank of {name}, which is {out_features}x{in_features}")
            build: Any = LowRankLinear
            if (own := lowrank["pivot_rows"].get(name)) is not None:
                if own > min(rank, out_features - 1):
                    raise ValueError(
                        f"lowrank.pivot_rows: {own} is too many for {name}, {out_features} rows of rank {rank}"
                    )
                build = partial(PivotLinear, pivot_rows=own)
            options = {"bias": dense.bias is not None, "device": weight.device, "dtype": weight.dtype}
            self.set_submodule(name, build(in_features, out_features, rank, **options))
        for name in lowrank["pivot_rows"]:
            self._stock(name, "pivot_rows", PivotLinear)
        for name, owner in lowrank["shared_down"].items():
            ours, theirs = (self._stock(end, "shared_down", LowRankLinear).down.weight for end in (name, owner))
            if owner in lowrank["shared_down"] or ours.shape != theirs.shape:
                raise ValueError(f"lowrank.shared_down: {name} cannot share the factor of {owner}")
        for name, (bits, group) in lowrank["rounded"].items():
            dense = self._stock(name, "rounded", (nn.Linear, Conv1D))
            weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
            out_features, in_features = weight.shape
            options = {"bias": dense.bias is not None, "device": weight.device, "dtype": weight.dtype}
            self.set_submodule(name, RoundedLinear(in_features, out_features, bits, group, **options))
        shared = lowrank["shared_down"].items()
        self._shared_down = {f"{name}.down.weight": f"{owner}.down.weight" for name, owner in shared}
        # transformers 4 has a list here: without sharing it is left alone, and the checkpoint loads there too.
        if self._shared_down:
            self._tied_weights_keys = (self._tied_weights_keys or {}) | self._shared_down
        # The stock class has called it too early: new weights are initialised and tied here.
        self.post_init()

    def _stock(self, name: str, entry: str, kind: Any) -> Any:
        try:
            module = self.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, kind):
            raise ValueError(f"lowrank.{entry} names {name!r}, and the model has no such layer")
        return module

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The stock class's tied weights, none if the embedding is not tied, and the shared factors."""
        return super().get_expanded_tied_weights_keys(all_submodels) | self._shared_down


def _checked(lowrank: Any) -> dict[str, Any]:
    """The entries of a compressed model's configuration, all there; `ValueError` for values of a wrong kind."""
    entries = lowrank if isinstance(lowrank, dict) else {}
    found = {
        "ranks": entries.get("ranks"),
        "shared_down": entries.get("shared_down"),
        "pivot_rows": entries.get("pivot_rows", {}),
        "rounded": entries.get("rounded", {}),
        "shapes": entries.get("shapes", {}),
        "shortcuts": entries.get("shortcuts", []),
        "experts": entries.get("experts", []),
    }
    kinds: dict[str, Any] = {
        "ranks": _is_size,
        "shared_down": lambda owner: isinstance(owner, str),
        "pivot_rows": _is_count,
        "rounded": lambda form: isinstance(form, list | tuple) and [*form[:-1]] in ([4], [8]) and _is_count(form[-1]),
        "shapes": lambda shape: isinstance(shape, list | tuple) and len(shape) == 2 and all(map(_is_size, shape)),
    }
    for entry, is_right in kinds.items():
        if not isinstance(found[entry], dict):
            raise ValueError(f"lowrank.{entry} is {found[entry]!r}: it must say something of every layer by its name")
        for name, value in found[entry].items():
            if not is_right(value):
                raise ValueError(f"lowrank.{entry}: {value!r} cannot be right for {name!r}")
    for entry in ("shortcuts", "experts"):
        if not isinstance(found[entry], list) or not all(isinstance(name, str) for name in found[entry]):
            raise ValueError(f"lowrank.{entry} is {found[entry]!r}: it must be a list of layers")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _validate(config: Any) -> None:
    """Check all but that the heads divide the hidden size: a sliced one they need not, head_dim is explicit."""
    for validator in config.__class_validators__:
        if validator.__name__ != "validate_architecture":
            validator(config)


def derive_classes(
    stock_config: type[PretrainedConfig], stock_model: type[PreTrainedModel], mixin: type[LowRankModel] = LowRankModel
) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Make the configuration and model class of a compressed checkpoint from those of the stock model."""
    config = type(
        f"LowRank{stock_config.__name__}",
        (stock_config,),
        {
            "__module__": __name__,
            "__annotations__": {"lowrank": dict | None},
            "lowrank": None,
            "model_type": f"lowrank_{stock_config.model_type}",
            # Stock plans of tensor parallelism name linears that are two now.
            "base_model_tp_plan": None,
            "validate": _validate,
        },
    )
    attributes = {"__module__": __name__, "config_class": config}
    return config, type(f"LowRank{stock_model.__name__}", (mixin, stock_model), attributes)
