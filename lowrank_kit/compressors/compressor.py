"""What a compressor is: settings that say what to look at, what to keep, and how the model becomes that."""

import atexit
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Int64
from pydantic import Field

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import Method, ModelConfig, RuntimeConfig, SingleTask
from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.plan import Plan

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel


def own_folder() -> Path:
    """A folder that is gone with this process."""
    folder = mkdtemp(prefix="lowrank_kit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@dataclass(frozen=True)
class Context:
    """What a compressor works with.

    ``samples`` are calibration windows of equal length, ``probe_windows`` the held-out ones that ``method.probe`` asks
    for. ``cache`` is the folder of the content-keyed cache, by default one of this process alone. ``unfinished`` is
    where `apply` keeps what a killed run goes on from; None: nowhere. ``progress`` shows bars; None: none are shown.
    """

    model: "PreTrainedModel"
    layout: ModelLayout
    samples: CalibrationSamples
    cache: Path = field(default_factory=own_folder)
    probe_windows: Int64[Tensor, "windows tokens"] | None = None
    unfinished: Path | None = None
    progress: "Progress | None" = None


class Compressor(Method):
    """Makes the model smaller, without training.

    Its statistics are whatever `calibrate` returns: only the compressor itself reads them. A process that begins at a
    later stage calls `calibrate` again, which finds what was computed before in ``context.cache``.
    """

    compresses: ClassVar[bool] = True

    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of the decoder-linear parameters (all linears in the blocks) that is removed."""

    @property
    def calibrates(self) -> bool:
        """See `Method`."""
        return True

    def requirements(self, model: ModelConfig, runtime: RuntimeConfig, task: SingleTask) -> Iterator[str]:
        """A causal language model in a float format."""
        if task.kind != "causal":
            yield (
                f"method={self.name} compresses causal language models, and task={task.name} is for classifiers: "
                "choose task=perplexity, or a method that adapts"
            )
        if model.quantization != "none":
            yield f"method={self.name} compresses float weights: use model.quantization=none"

    def check_streamed(self) -> None:
        """Raise `ConfigError` unless this works on a model of which one block is in memory at a time."""
        raise ConfigError(
            f"method={self.name} needs the whole model in memory: use runtime.weights=resident, or a method of the SVD "
            "family, such as svd_llm"
        )

    def budget(self, layout: ModelLayout) -> int:
        """Parameters that may be left of the linears in the blocks."""
        return self.left_of(layout.parameters)

    def left_of(self, total: int) -> int:
        """What the ratio leaves of so many."""
        # 1 - 0.9 is a hair less than a tenth in binary.
        return int(round((1 - self.ratio) * total, 6))

    def calibrate(self, context: Context) -> Any:
        """Collect what `plan` reads. The model is left as it was."""

    def plan(self, statistics: Any, context: Context) -> Plan:
        """Decide what is kept, within the budget. The model is left as it was."""
        raise NotImplementedError

    def apply(self, plan: Plan, statistics: Any, context: Context) -> "PreTrainedModel":
        """Return the compressed model; the original may have been changed into it."""
        raise NotImplementedError

    def plot(self, plan: Plan, statistics: Any, context: Context, folder: Path) -> None:
        """Draw what `plan` saw and decided into an existing folder."""


class Compression:
    """A compressor and the context it works in. What it found of the original model is at hand from then on."""

    def __init__(self, method: Compressor, context: Context) -> None:
        self.method, self.context = method, context

    def calibrate(self) -> Any:
        """See `Compressor.calibrate`; it is called once."""
        return self._statistics

    def plan(self) -> Plan:
        """See `Compressor.plan`."""
        return self.method.plan(self._statistics, self.context)

    def apply(self, plan: Plan) -> "PreTrainedModel":
        """See `Compressor.apply`."""
        return self.method.apply(plan, self._statistics, self.context)

    def plot(self, plan: Plan, folder: Path) -> None:
        """See `Compressor.plot`."""
        self.method.plot(plan, self._statistics, self.context, folder)

    @cached_property
    def _statistics(self) -> Any:
        return self.method.calibrate(self.context)
