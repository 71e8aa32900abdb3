"""The book that is kept of a run's stages: which are to be done, which is being done, what each took."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from lowrank_kit import distributed
from lowrank_kit.config import Stage
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.memory import within_memory
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

# They only read the model, and can be done again with smaller batches.
_READ: Collection[Stage] = ("calibrate", "evaluate")
_TAKES_LESS: Mapping[Stage, str] = {
    "calibrate": "lower calibration.seq_len, or have one block in memory at a time (runtime=streamed)",
    "plan": "lower the windows that the allocation measures on, or use one that does not measure the model",
    "apply": "have one block in memory at a time (runtime=streamed), or use a method without correction",
    "train": "halve train.batch_size and double train.gradient_accumulation, which is the same training; or set "
    "train.gradient_checkpointing=true",
    "evaluate": "lower task.window, or spread the model over all memory that there is (runtime=spread)",
}


@dataclass(frozen=True)
class Ledger:
    """The stages ``todo`` of one task's run; ``facts`` tells of its data what the manifest shall say."""

    task: str
    run: RunDirectory
    manifest: Manifest
    todo: Collection[Stage]
    facts: Callable[[], Mapping[str, Any]]

    def do(self, stage: Stage, work: Callable[[], Outcome], *, alone: bool = False) -> Outcome | None:
        """Do the work of a stage, if it is to be done, and note it; its outcome is on disk when this returns.

        Of several processes all do it together, each with its outcome, or the first does it ``alone``, and its outcome
        is everybody's.
        """
        if stage not in self.todo:
            return None
        task = partial(within_memory, work) if stage in _READ else work
        with self._noted(stage):
            return distributed.on_main(task) if alone else task()

    @contextmanager
    def _noted(self, stage: Stage) -> Iterator[None]:
        self.run.begin(stage)
        try:
            with self.manifest.stage(stage):
                yield
        except torch.OutOfMemoryError as error:
            raise LowRankKitError(
                f"{self.task}: the device has no memory for the stage {stage} ({str(error).partition('. ')[0]}). The "
                f"stages before it are kept. What takes less: dtype=bfloat16, where it is not set; {_TAKES_LESS[stage]}"
            ) from error
        finally:
            self.manifest.record("data", self.facts())
            self.run.write_json("manifest.json", self.manifest.as_dict())
        self.run.mark(stage)
        log.info("%s: %s, %.1f s", self.task, stage, self.manifest.seconds(stage))
