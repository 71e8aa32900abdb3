"""Compressors at work on a model."""

from lowrank_kit.compression.base import Compression, Workbench
from lowrank_kit.compression.grasp import GraspCompression
from lowrank_kit.compression.laco import LaCoCompression
from lowrank_kit.compression.llm_pruner import PrunerCompression
from lowrank_kit.compression.shortgpt import ShortGPTCompression
from lowrank_kit.compression.slicegpt import SliceCompression
from lowrank_kit.compression.svd import SvdCompression
from lowrank_kit.errors import ConfigError
from lowrank_kit.methods.base import Compressor
from lowrank_kit.methods.grasp import Grasp
from lowrank_kit.methods.laco import LaCo
from lowrank_kit.methods.llm_pruner import LLMPruner
from lowrank_kit.methods.shortgpt import ShortGPT
from lowrank_kit.methods.slicegpt import SliceGPT
from lowrank_kit.methods.svd import TruncatedSVD

# What does the work of a method, and of those derived from it; a package of your own may add to it.
COMPRESSIONS: dict[type[Compressor], type[Compression]] = {
    TruncatedSVD: SvdCompression,
    LLMPruner: PrunerCompression,
    SliceGPT: SliceCompression,
    Grasp: GraspCompression,
    ShortGPT: ShortGPTCompression,
    LaCo: LaCoCompression,
}


def at_work(method: Compressor, bench: Workbench) -> Compression:
    """The compressor at work on a model. Raises `ConfigError` for a class that `COMPRESSIONS` does not know."""
    for kind in type(method).__mro__:
        if kind in COMPRESSIONS:
            return COMPRESSIONS[kind](method, bench)
    raise ConfigError(
        f"method={method.name}: {type(method).__qualname__} says nothing of how it works; derive it from one of "
        f"{', '.join(known.__name__ for known in COMPRESSIONS)}, or enter it in lowrank_kit.compression.COMPRESSIONS"
    )
