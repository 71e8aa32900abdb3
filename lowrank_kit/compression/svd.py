"""The SVD family at work: decompose once for every ratio, allocate, factorise."""

from functools import cached_property
from pathlib import Path

from jaxtyping import Float64
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.compression.apply import factorise
from lowrank_kit.compression.base import Compression
from lowrank_kit.compression.decompose import Decomposition, decompose
from lowrank_kit.compression.probe import LossProbe
from lowrank_kit.compression.sequential import factorise_sequentially
from lowrank_kit.methods.base import Plan
from lowrank_kit.methods.svd import TruncatedSVD
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.plots.spectra import plot_spectra


class SvdCompression(Compression[TruncatedSVD]):
    """See `Compression`."""

    _progress: Progress | None = None

    def calibrate(self, progress: Progress | None = None) -> None:
        """Decompose every matrix; spectra and vectors go to the content-keyed cache, for every ratio to come."""
        self._progress = progress
        _ = self._decomposition, self._influence

    def plan(self, progress: Progress | None = None) -> Plan:
        """Decide every rank."""
        self._progress = progress
        bench, decomposition, probe = self.bench, self._decomposition, None
        if bench.probe_windows is not None:
            probe = LossProbe(bench.model, decomposition, bench.probe_windows, progress)
        return self.method.plan(bench.layout, decomposition.candidates, probe, self._influence)

    def apply(self, plan: Plan, progress: Progress | None = None) -> PreTrainedModel:
        """Factorise the planned matrices, in place."""
        self._progress = progress
        bench, decomposition = self.bench, self._decomposition
        if self.method.correction != "none":
            factorise_sequentially(
                bench.model,
                self.method,
                plan,
                bench.samples,
                batch_size=bench.batch_size,
                gradients=decomposition.gradients,
                progress=progress,
            )
        else:
            factorise(bench.model, plan, decomposition)
        return bench.model

    def plot(self, plan: Plan, folder: Path) -> None:
        """Spectra and ranks."""
        linears = self.bench.layout.linears
        singular = {c.name: c.tail.sqrt().tolist() for c in self._decomposition.candidates}
        plot_spectra(linears, singular, folder / "spectra.png", f"singular value ({self.method.truncation.kind})")
        plot_rank_map(linears, plan.ranks, folder / "rank_map.png")
        plot_kept_ranks(linears, plan.ranks, folder / "kept_ranks.png")

    @cached_property
    def _influence(self) -> Float64[Tensor, " blocks"] | None:
        """Influence of every block, where floors are set by it."""
        if not self.method.allocation.keep.influence:
            return None
        bench = self.bench
        return block_influence(
            bench.model, bench.layout, bench.samples, bench.batch_size, cache=bench.cache, progress=self._progress
        )

    @cached_property
    def _decomposition(self) -> Decomposition:
        bench = self.bench
        return decompose(
            bench.model,
            self.method,
            bench.samples,
            batch_size=bench.batch_size,
            cache=bench.cache,
            progress=self._progress,
        )
