"""ReplaceMe: a run of blocks becomes one linear map of the MLP outputs before it (arXiv 2505.02819).

With m what the MLP of the block before the run adds to the residual stream, y the stream that m is added to, and h the
stream behind the run, T minimises the distance between ``y + T m`` and h over calibration tokens. As T acts on outputs
of the down projection alone, it is multiplied into that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Float64
from pydantic import Field

from lowrank_kit.calibration.batches import batches_of
from lowrank_kit.calibration.collect import calibration_key
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.statistics import Distance
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.calibration.texts import measured
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.compressors.compressor import Compressor, Context
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.blocks import block_sizes, check_joining, fewest_blocks, ranks_with
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.layout import LinearRef, ModelLayout
from lowrank_kit.models.linear import map_outputs
from lowrank_kit.plan import Plan
from lowrank_kit.plots.block_scores import plot_influence
from lowrank_kit.progress import Bar
from lowrank_kit.spectral.moments import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The authors' numerical solver (ReplaceMe/utils.py, adam_method).
PASSES, TOKENS_A_STEP, LEARNING_RATE = 10, 1024, 1e-4


@dataclass(frozen=True)
class Replacement:
    """The distance across every run of blocks that has a block before it, by first block, and the map for the least."""

    distances: dict[int, float]
    first: int
    transform: Float64[Tensor, "d d"]


class ReplaceMe(Compressor):
    """Drops the run of as few blocks as reach the ratio, so up to one block's parameters more than asked for.

    What is left is a stock model with fewer blocks. The first block always stays, for the map is merged into a block
    before the run.
    """

    distance: Distance = "cosine"
    """The run of least distance between the hidden states before and behind it goes: `cosine` is 1 - cos of the two,
    `angular` is arccos(cos) / pi."""
    objective: Literal["least_squares", "cosine"] = "least_squares"
    """What T minimises: `least_squares` is ``|T m - (h - y)|^2``, in closed form; `cosine` is 1 - cos of ``T m`` and
    ``h - y``, by Adam from T = I."""
    ridge: float = Field(default=0, ge=0)
    """Of `least_squares`: penalty on the squared entries of T, as a share of the MLP outputs' mean energy."""

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` where every block would go, or no map can be merged into the block before a run."""
        fewest_blocks(layout, self.budget(layout))
        layout.select()
        check_joining(layout, f"method={self.name}", "added")
        for block in range(len(layout.blocks) - 1):
            _down(layout, block)

    def check_tokens(self, layout: ModelLayout, tokens: int) -> None:
        """Raise `ConfigError` for fewer tokens than the map has columns: it would not be determined."""
        if tokens < (width := _down(layout, 0).out_features):
            raise ConfigError(
                f"{tokens} calibration tokens cannot determine a map of {width} directions: raise calibration.samples "
                f"or calibration.seq_len; their product should be ten times {width}, at least {width}"
            )

    def calibrate(self, context: Context) -> Replacement:
        """Measure the runs of blocks, choose one, and fit its map; both are cached."""
        layout = context.layout
        self.check_tokens(layout, context.samples.tokens)
        span = fewest_blocks(layout, self.budget(layout))
        found = block_influence(
            context.model,
            context.samples,
            distance=self.distance,
            span=span,
            cache=context.cache,
            progress=context.progress,
        )
        distances = {first: float(value) for first, value in enumerate(found) if first > 0}
        first = min(distances, key=lambda block: distances[block])
        run = {"first": first, "span": span}
        asked = {"quantity": "replacement", "objective": self.objective, "ridge": self.ridge, **run}
        key = calibration_key(context.model, context.samples, "blocks", asked, (type(self),))
        store = CalibrationStore(context.cache, key)
        with store.missing([first]) as missing:
            if missing:
                store.save(first, {"run": {"transform": self._fitted(context, first, span).cpu()}})
        return Replacement(distances, first, store.load(first)["run"]["transform"])

    def plan(self, statistics: Replacement, context: Context) -> Plan:
        """The blocks of the run go."""
        layout, sizes = context.layout, block_sizes(context.layout)
        span = fewest_blocks(layout, self.budget(layout))
        gone = range(statistics.first, statistics.first + span)
        kept = tuple(block for block in range(len(sizes)) if block not in gone)
        scores = {f"blocks {i}-{i + span - 1}": value for i, value in statistics.distances.items()}
        after = sum(sizes[block] for block in kept)
        return Plan(self.name, ranks_with(layout, kept), kept, sum(sizes), after, scores)

    def apply(self, plan: Plan, statistics: Replacement, context: Context) -> "PreTrainedModel":
        """Merge the map into the block before the run and drop the run, in place."""
        down: Any = context.model.get_submodule(_down(context.layout, statistics.first - 1).name)
        map_outputs(down, statistics.transform)
        drop_blocks(context.model, context.layout, plan.kept_blocks)
        return context.model

    def plot(self, plan: Plan, statistics: Replacement, context: Context, folder: Path) -> None:
        """The distance across the run that begins at a block."""
        count = len(context.layout.blocks)
        distances = [statistics.distances.get(block, math.nan) for block in range(count)]
        plot_influence(distances, {statistics.first}, folder / "distance.png", "distance across the run", "replaced")

    def _fitted(self, context: Context, first: int, span: int) -> Float64[Tensor, "d d"]:
        if self.objective == "cosine":
            return _nearest_in_angle(context, first, span)
        return self._least_squares(context, first, span)

    def _least_squares(self, context: Context, first: int, span: int) -> Float64[Tensor, "d d"]:
        """``T = C_tm (C_mm + ridge)^+``, with t = h - y; what no token reaches of m is left as it is."""
        down = _down(context.layout, first - 1)
        width = down.out_features
        # Of m beside what the run adds, t - m: one sum has both products.
        sums = Moments.zeros(2 * width, context.model.device)
        for written, added in _pairs(context, first, span):
            sums.update(torch.cat([written, added], 1))
        gram, cross = sums.gram[:width, :width], sums.gram[width:, :width]
        ridge = self.ridge * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype, device=gram.device)
        change = (cross - ridge) @ torch.linalg.pinv(gram + ridge, hermitian=True)
        return change + torch.eye(width, dtype=gram.dtype, device=gram.device)


def _nearest_in_angle(context: Context, first: int, span: int) -> Float64[Tensor, "d d"]:
    """The T that Adam finds for ``1 - cos(T m, h - y)``, as the authors run it; m and h - y wait as `Hidden` says."""
    device = context.model.device
    pairs = Hidden(device)
    for number, (written, added) in enumerate(_pairs(context, first, span)):
        pairs[number] = torch.stack([written, written + added]).float()
    transform = torch.eye(pairs[0].shape[-1], device=device, requires_grad=True)
    adam = torch.optim.Adam([transform], lr=LEARNING_RATE)
    draw = torch.Generator().manual_seed(0)
    for _ in range(PASSES):
        for written, target in _shuffled(pairs, number + 1, draw):
            loss = 1 - torch.nn.functional.cosine_similarity(written @ transform.T, target).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return transform.detach().double()


def _shuffled(pairs: Hidden, count: int, draw: "torch.Generator") -> Iterator[Float[Tensor, "2 tokens d"]]:
    """`TOKENS_A_STEP` tokens at a time, of batches in random order."""
    waiting = pairs[0][:, :0]
    for number in torch.randperm(count, generator=draw).tolist():
        rows = pairs[number]
        order = torch.randperm(rows.shape[1], generator=draw).to(rows.device)
        waiting = torch.cat([waiting, rows[:, order]], 1)
        *whole, waiting = waiting.split(TOKENS_A_STEP, 1)
        yield from whole
    yield waiting


def _pairs(
    context: Context, first: int, span: int
) -> Iterator[tuple[Float64[Tensor, "tokens d"], Float64[Tensor, "tokens d"]]]:
    """Of every batch's measured tokens, what the MLP before the run writes and what the run adds to the stream.

    Batch by batch through the run: no other hidden states than one batch's wait.
    """
    model, samples = context.model, context.samples
    down = _down(context.layout, first - 1).name
    walk = BlockWalk(model, context.layout, batches_of(model, samples))
    bar = Bar(context.progress, "fit the map", len(walk.batches))
    written: list[Tensor] = []
    writes = {down: lambda _number, _read, output: written.append(output)}
    for block in walk.forward(until=first - 1):
        for number, batch in enumerate(walk.batches if block.index == first - 1 else ()):
            mask = measured(batch["attention_mask"], samples.opening).to(model.device)
            with walk.watching(writes=writes):
                before = after = block.run(number)
            for index in range(first, first + span):
                after = walk.run(index, number, after)
            # OPT's linears see the tokens of all rows in one list.
            outputs = written.pop().view_as(before)[mask].double()
            yield outputs, after[mask].double() - before[mask].double()
            bar.advance()


def _down(layout: ModelLayout, block: int) -> LinearRef:
    """The one linear by which a block's MLP writes to the stream. Raises `ConfigError` where experts do."""
    writers = [ref for ref in layout.linears if ref.block == block and ref.writes_residual and ref.kind != "attention"]
    if len(writers) > 1:
        raise ConfigError(
            f"method=replace_me multiplies a map into the one down projection of a block, and block {block} of this "
            f"{layout.model_type} has {len(writers)}, of experts that a router mixes: use method=prune_comp or shortgpt"
        )
    return writers[0]
