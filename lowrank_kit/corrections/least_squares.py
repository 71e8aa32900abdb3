"""The dense weight that fits a layer's original outputs on other inputs, from second moments alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64

from lowrank_kit.calibration.stream import Magnitudes
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import LinearRef
from lowrank_kit.spectral.eliminate import compensated
from lowrank_kit.spectral.moments import ROWS_PER_PRODUCT, Moments


@dataclass
class Read:
    """What a linear reads, `[rows, tokens, in]`, and the residual stream that its outputs would be added to."""

    inputs: Tensor
    stream: Tensor


@dataclass
class Corrected:
    """`W* = W inputs + residual`, and the moments and magnitudes that the truncation of W* is measured in.

    Where the linear loses inputs, W* reads those that are left.
    """

    inputs: Float64[Tensor, "in left"]
    residual: Float64[Tensor, "out left"] | None
    moments: Moments
    magnitudes: Float64[Tensor, " in"]

    def applied(self, weight: Float64[Tensor, "out in"]) -> Float64[Tensor, "out left"]:
        """W*."""
        corrected = weight @ self.inputs
        return corrected if self.residual is None else corrected + self.residual


class Sums:
    """Second moments of what a group of linears reads, in the original model and in the compressed one."""

    def __init__(self, ref: LinearRef, with_stream: bool, opening: int, device: "torch.device") -> None:
        self._ref, self._opening = ref, opening
        self._old, self._new = Moments.zeros(ref.in_features, device), Moments.zeros(ref.in_features, device)
        self._old_magnitudes, self._new_magnitudes = (Magnitudes(ref.in_features, device) for _ in range(2))
        self._difference = torch.zeros_like(self._new.gram)
        self._stream = torch.zeros(ref.out_features, ref.in_features).to(self._difference) if with_stream else None

    def add(self, old: Read, new: Read) -> None:
        """Add one batch: sums of `x x^T`, `x' x'^T`, `(x - x') x'^T` and `(h - h') x'^T`."""
        before, after = (self._rows(read.inputs.view(*read.stream.shape[:2], -1)) for read in (old, new))
        self._old.update(before)
        self._new.update(after)
        self._old_magnitudes.update(before)
        self._new_magnitudes.update(after)
        _add_product(self._difference, before - after, after)
        if self._stream is not None:
            _add_product(self._stream, self._rows(old.stream - new.stream), after)

    def add_sums(self, other: "Sums") -> None:
        """Take in those of other batches."""
        for mine, others in ((self._old, other._old), (self._new, other._new)):
            mine.gram += others.gram
            mine.total += others.total
            mine.count += others.count
        for ours, theirs in (
            (self._old_magnitudes, other._old_magnitudes),
            (self._new_magnitudes, other._new_magnitudes),
        ):
            ours.total += theirs.total
            ours.count += theirs.count
        self._difference += other._difference
        if self._stream is not None and other._stream is not None:
            self._stream += other._stream

    def error(
        self,
        weight: Float64[Tensor, "out in"],
        corrected: Float64[Tensor, "out left"],
        anchor: float,
        kept: Sequence[int] | None = None,
    ) -> float:
        """What `correction` minimises, of any weight W* in these batches, but for a constant that no W* changes."""
        left = slice(None) if kept is None else list(kept)
        gram = self._new.gram + anchor * self._old.gram
        # (W X + H - H') X'^T + anchor W X X^T, and X X'^T is the difference's product and the new inputs' own.
        wanted = weight @ (self._difference + gram)
        if self._stream is not None:
            wanted = wanted + self._stream
        quadratic = (corrected @ gram[left][:, left] * corrected).sum()
        return float(quadratic - 2 * (corrected * wanted[:, left]).sum())

    def correction(self, anchor: float, ridge: float, kept: Sequence[int] | None = None) -> Corrected:
        """The minimiser W* of `|W X + (H - H') - W* X'|^2 + anchor |(W - W*) X|^2`, without H where no stream is kept.

        With `M = C_X'X' + anchor C_XX` it is `W + (W (C_XX' - C_X'X') + C_(H-H')X') (M + ridge I)^-1`; the ridge, in
        units of the mean diagonal, pulls it towards W. Of ``kept`` inputs alone: W* and X' are those columns and rows,
        and W in the place that the ridge pulls to is W refitted to them.
        """
        gram = self._new.gram + anchor * self._old.gram
        every = torch.eye(len(gram)).to(gram)
        left, start = (slice(None), every) if kept is None else (list(kept), compensated(every, gram, kept))
        damped = gram[left][:, left].clone()
        damped.diagonal().add_(ridge * float(gram.diagonal().mean()))
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise LowRankKitError(
                f"{self._ref.name} cannot be refitted: its inputs do not determine a weight, and a ridge of {ridge:g} "
                "is too little beside them; raise method.correction.ridge, to 1e-5 or more"
            )
        inputs = start + torch.cholesky_solve(self._difference[:, left].T, root).T
        residual = None if self._stream is None else torch.cholesky_solve(self._stream[:, left].T, root).T
        moments = Moments(gram / (1 + anchor), self._new.total, self._new.count)
        magnitudes = self._new_magnitudes.mean() + anchor * self._old_magnitudes.mean()
        return Corrected(inputs, residual, moments, magnitudes / (1 + anchor))

    def _rows(self, activations: Float[Tensor, "rows tokens _"]) -> Float[Tensor, "counted _"]:
        return activations[:, self._opening :].to(self._difference.device).flatten(0, -2).float()


def _add_product(
    total: Float64[Tensor, "m n"], left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]
) -> None:
    for a, b in zip(left.split(ROWS_PER_PRODUCT), right.split(ROWS_PER_PRODUCT), strict=True):
        total += a.T @ b
