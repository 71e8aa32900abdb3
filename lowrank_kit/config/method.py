"""What every method is: settings, and what they ask of the rest of a run."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lowrank_kit.config.model import ModelConfig
from lowrank_kit.config.runtime import RuntimeConfig
from lowrank_kit.config.section import Section
from lowrank_kit.config.tasks import SingleTask
from lowrank_kit.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_kit.models.layout import ModelLayout


class Method(Section):
    """A method's settings. Subclasses add theirs; their fields are the keys of ``conf/method/NAME.yaml``."""

    trains: ClassVar[bool] = False
    """Whether weights learn what a task teaches."""
    adapts: ClassVar[bool] = False
    """Whether what learns is an adapter beside the weights."""
    compresses: ClassVar[bool] = False
    """Whether the model becomes smaller."""
    factorises: ClassVar[bool] = False
    """Whether some linears become products of two, which recovery may train."""

    name: str
    """Name in tables and run directories."""
    # Left out where it says nothing, so that older run directories are found again.
    preset: str = Field(default="default", exclude_if=lambda preset: preset == "default")
    """`default`: the toolkit's own settings; `paper`: the published ones, of this method and its parts, calibration
    included. What else is on the command line wins over them."""

    @property
    def rounds(self) -> bool:
        """Whether it may leave weights of few bits, which nothing trains."""
        return False

    @property
    def calibrates(self) -> bool:
        """Whether the method reads calibration samples."""
        return False

    @property
    def probe(self) -> tuple[int, int] | None:
        """Held-out calibration windows to measure the model on, as (how many, tokens each); None: no need of any."""
        return None

    @property
    def reads_gradients(self) -> bool:
        """Whether calibration runs the whole model backward."""
        return False

    def requirements(self, model: ModelConfig, runtime: RuntimeConfig, task: SingleTask) -> Iterator[str]:
        """What of the rest of a run the method cannot work with, a sentence each. Reads settings alone."""
        yield from ()

    def check(self, layout: "ModelLayout") -> None:
        """Raise `ConfigError` for settings that no model of this layout can meet. Reads shapes, no weights."""

    def check_streamed(self) -> None:
        """Raise `ConfigError` unless this works on a model of which one block is in memory at a time."""
        raise ConfigError(f"runtime.weights=streamed is for compression, and method={self.name} compresses nothing")

    def check_tokens(self, layout: "ModelLayout", tokens: int) -> None:
        """Raise `ConfigError` for fewer calibration tokens, of running text, than the method needs."""


class Baseline(Method):
    """No method: the model as it is, evaluated."""
