"""The two classes of linear layer that transformers models are made of, behind one orientation."""

from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from jaxtyping import Float

from lowrank_kit.deferred import Tensor, nn, no_grad
from lowrank_kit.errors import LowRankKitError

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

    Linear: TypeAlias = nn.Linear | Conv1D
else:
    Linear = Any


def check_linear(module: "nn.Module", name: str) -> Linear:
    """Return ``module`` if it is a plain linear layer, else raise `LowRankKitError` naming its class.

    Subclasses do not count: a quantised or PEFT-wrapped layer keeps its weight in a form of its own.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) in (nn.Linear, Conv1D):
        return module  # type: ignore[return-value]
    raise LowRankKitError(
        f"'{name}' is a {type(module).__module__}.{type(module).__qualname__}; only torch.nn.Linear and "
        "transformers' Conv1D are understood. Load the model unquantised and without adapters."
    )


def is_transposed(module: Linear) -> bool:
    """Say whether the module stores its weight as ``[in, out]`` (GPT-2's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def weight_of(module: Linear) -> Float[Tensor, "out in"]:
    """Return the weight as ``[out, in]``: a view, never a copy."""
    return module.weight.T if is_transposed(module) else module.weight


def is_quantised(module: "nn.Module") -> "TypeGuard[nn.Linear]":
    """Say whether the module is a linear layer with packed integers for weights: bitsandbytes' or our own."""
    from lowrank_kit.models.portable import RoundedLinear

    if isinstance(module, RoundedLinear):
        return True
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


@no_grad
def dense_weight(module: "nn.Module") -> Float[Tensor, "out in"]:
    """Return the weight as ``[out, in]``: dequantised if need be, else a view.

    Raises `LowRankKitError` for quantised weights on a CPU, where bitsandbytes does not give them back reliably.
    """
    from lowrank_kit.models.portable import RoundedLinear

    if isinstance(module, RoundedLinear):
        return module.weight
    if not is_quantised(module):
        return weight_of(check_linear(module, type(module).__name__))
    if module.weight.device.type == "cpu":
        raise LowRankKitError(
            "bitsandbytes does not give quantised weights on a CPU back reliably: use a GPU, the unquantised model, or "
            "a method that reads no weights (lora, eva)"
        )
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


@no_grad
def set_weight(module: Linear, weight: Float[Tensor, "out in"]) -> None:
    """Copy ``weight`` into the module in place, in the module's own orientation, dtype and device."""
    weight_of(module).copy_(weight)


@no_grad
def map_outputs(module: Linear, transform: Float[Tensor, "out out"]) -> None:
    """Multiply ``transform`` into the module in place, so that it gives ``transform y`` where it gave y."""
    product = transform.double().to(module.weight.device)
    set_weight(module, product @ weight_of(module).double())
    if module.bias is not None:
        module.bias.copy_(product @ module.bias.double())
