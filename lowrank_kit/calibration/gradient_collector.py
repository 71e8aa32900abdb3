"""Sums over the gradients of some linears, in float32 and float64 whatever the model's dtype."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int64

from lowrank_kit import distributed
from lowrank_kit.calibration.batches import Batch
from lowrank_kit.calibration.next_token_loss import SummedLoss, predicted_tokens
from lowrank_kit.calibration.statistics import GradientRequest, GradientStatistics
from lowrank_kit.calibration.texts import measured
from lowrank_kit.data.padding import NOT_PREDICTED
from lowrank_kit.deferred import PreTrainedModel, Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.experts import tokens_of
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.models.linear import check_linear, weight_of
from lowrank_kit.spectral.moments import Moments

NEARLY_ZERO = 1e-4
"""A gradient of so small a share of the mean norm is rounding, and has no direction: the query of a window's first
token, which attends to nothing but itself, has one."""


class GradientCollector:
    """Sums over what linears read and the gradients at their outputs, as `writes` is told of them.

    Autograd accumulates nothing: it would sum in the model's dtype, where half precision loses small gradients. No
    parameter has to want a gradient either; a graph begins at the lowest of the linears.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        refs: Collection[LinearRef],
        request: GradientRequest,
        loss: SummedLoss,
        opening: int = 0,
    ) -> None:
        self._model, self._request, self._summed_loss, self._opening = model, request, loss, opening
        for ref in refs:
            check_linear(model.get_submodule(ref.name), ref.name)
        self._refs = refs
        # From the first gradient on: of a streamed model only the block at work has any.
        self._sums: dict[LinearRef, _Sums] = {}
        self._predicted = self._positions = 0
        # By batch: its rows and tokens, and the positions whose gradients the moments count.
        self._rows: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}

    @property
    def writes(self) -> dict[str, Callable[[int, Tensor, Tensor], None]]:
        """See `lowrank_kit.calibration.walk.Writes`."""
        return {ref.name: partial(self._observe, ref) for ref in self._refs}

    def loss(self, number: int, batch: Batch) -> Tensor | None:
        """See `lowrank_kit.calibration.backward.Loss`."""
        self._rows[number], self._tokens[number] = batch["input_ids"].shape[0], batch["input_ids"].numel()
        if self._request.moments:
            real = batch["attention_mask"].bool()
            self._kept[number] = within_margin(real, self._request.margin) & measured(real, self._opening)
            self._positions += int((self._kept[number] & (predicted_tokens(batch) != NOT_PREDICTED)).sum())
        total, predicted = self._summed_loss(self._model, batch)
        self._predicted += predicted
        return total if predicted else None

    def statistics(self, refs: Collection[LinearRef]) -> dict[str, GradientStatistics]:
        """What all processes collected of these linears, by name; it is held no longer.

        To be asked when all batches have passed them. Raises `LowRankKitError` where it is not finite.
        """
        predicted, positions = int(distributed.total(self._predicted)), int(distributed.total(self._positions))
        found = {}
        for ref in refs:
            sums = self._sums_of(ref)
            distributed.add_up(*sums.tensors())
            found[ref.name] = sums.statistics(predicted, positions)
            del self._sums[ref]
        return found

    def _observe(self, ref: LinearRef, number: int, inputs: Tensor, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_()
        # What is not needed would wait for the backward pass all the same.
        read = inputs.detach() if self._request.mean or self._request.fisher else None
        tokens = None if ref.expert is None else tokens_of(self._model, ref)
        output.register_hook(partial(self._note, ref, number, tokens, read))

    def _sums_of(self, ref: LinearRef) -> "_Sums":
        if ref not in self._sums:
            module: Any = self._model.get_submodule(ref.name)
            self._sums[ref] = _Sums(module.weight, ref, self._request)
        return self._sums[ref]

    def _note(
        self, ref: LinearRef, number: int, tokens: Tensor | None, inputs: Tensor | None, gradient: Tensor
    ) -> None:
        sums, rows = self._sums_of(ref), self._rows[number]
        if tokens is not None:
            count = self._tokens[number]
            gradient = spread(gradient, tokens, count)
            inputs = None if inputs is None else spread(inputs, tokens, count)
        g = gradient.reshape(rows, -1, ref.out_features)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if inputs is not None:
            sums.add_weight_gradients(inputs.reshape(rows, -1, ref.in_features).to(g), g)
        if self._request.moments:
            kept = self._kept[number]
            if self._request.clipping is not None:
                g = clipped(g, kept, *self._request.clipping)
            module: Any = self._model.get_submodule(ref.name)
            sums.add_moments(g, kept, weight_of(module))


def spread(routed: Float[Tensor, "routed _"], tokens: Int64[Tensor, " routed"], count: int) -> Float[Tensor, "count _"]:
    """What an expert read or gave, at the places of its ``tokens`` among ``count``; zeros at the others'."""
    return routed.new_zeros(count, routed.shape[-1]).index_copy(0, tokens, routed)


class _Sums:
    """What is summed of one linear."""

    def __init__(self, weight: Tensor, ref: LinearRef, request: GradientRequest) -> None:
        self._ref, device, dtype = ref, weight.device, torch.promote_types(weight.dtype, torch.float32)
        self._moments = Moments.zeros(ref.full_rank, device) if request.moments else None
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._diagonal = torch.zeros(ref.out_features).to(self._energy) if request.diagonal else None
        self._fisher = torch.zeros(ref.in_features, dtype=torch.float64, device=device) if request.fisher else None
        self._mean = (
            torch.zeros(ref.out_features, ref.in_features, device=device, dtype=dtype) if request.mean else None
        )

    def add_weight_gradients(
        self, inputs: Float[Tensor, "rows tokens in"], gradients: Float[Tensor, "rows tokens out"]
    ) -> None:
        """Add every row's gradient in the weight: itself, and its square summed over the outputs."""
        for x, g in zip(inputs, gradients, strict=True):
            of_row = g.T @ x
            if self._fisher is not None:
                self._fisher += of_row.square().sum(0, dtype=torch.float64)
            if self._mean is not None:
                self._mean += of_row

    def add_moments(
        self, g: Float[Tensor, "rows tokens out"], kept: Bool[Tensor, "rows tokens"], weight: Float[Tensor, "out in"]
    ) -> None:
        """Add the second moment of the gradients at these positions, on the smaller side of the weight."""
        assert self._moments is not None
        g = g[kept]
        self._energy += g.square().sum(dtype=torch.float64)
        if self._diagonal is not None:
            self._diagonal += g.square().sum(0, dtype=torch.float64)
        try:
            self._moments.update(g if self._ref.out_features <= self._ref.in_features else g @ weight.to(g))
        except ValueError as error:
            raise LowRankKitError(f"gradients of {self._ref.name}: {error}") from error

    def tensors(self) -> list[Tensor]:
        """The sums, to be changed in place."""
        gram = None if self._moments is None else self._moments.gram
        return [part for part in (gram, self._energy, self._diagonal, self._fisher, self._mean) if part is not None]

    def statistics(self, predicted: int, positions: int) -> GradientStatistics:
        """The sums per predicted token."""
        if self._mean is not None and not self._mean.isfinite().all():
            raise LowRankKitError(
                f"the gradient of the loss in {self._ref.name} is not finite: use dtype=bfloat16 or float32, and look "
                "for weights that are not finite"
            )
        gram = None if self._moments is None else self._moments.gram / positions
        energy = 0.0 if self._moments is None else float(self._energy) / positions
        diagonal = None if self._diagonal is None else self._diagonal / positions
        fisher = None if self._fisher is None else self._fisher / predicted
        mean = None if self._mean is None else self._mean.div_(predicted)
        return GradientStatistics(gram, energy, diagonal, fisher, mean)


def within_margin(mask: Bool[Tensor, "rows tokens"], margin: float) -> Bool[Tensor, "rows tokens"]:
    """The real positions of every row but for this share of them, rounded down, at either end."""
    place, count = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    left_out = (margin * count).floor()
    return mask & (place >= left_out) & (place < count - left_out)


def clipped(
    g: Float[Tensor, "rows tokens out"], kept: Bool[Tensor, "rows tokens"], low: float, high: float
) -> Float[Tensor, "rows tokens out"]:
    """Scale every token's gradient so that its norm is ``low`` to ``high`` times the mean norm of its row.

    The mean is over kept tokens whose gradient is not zero, as in the code of LEMS (github.com/lems-svd/lems); what is
    zero but for rounding (`NEARLY_ZERO`) stays as it is.
    """
    norms = torch.linalg.vector_norm(g, dim=-1)
    counted = kept & (norms > NEARLY_ZERO * _mean(norms, kept))
    mean = _mean(norms, counted)
    scale = torch.where(counted, norms.clamp(low * mean, high * mean) / norms, 1)
    return g * scale[..., None]


def _mean(values: Float[Tensor, "rows tokens"], counted: Bool[Tensor, "rows tokens"]) -> Float[Tensor, "rows 1"]:
    return (values * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
