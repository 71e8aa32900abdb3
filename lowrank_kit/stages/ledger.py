"""The book that is kept of a run's stages: which are to be done, which is being done, what each took."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from lowrank_kit import distributed
from lowrank_kit.config import Stage
from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


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
        with self._noted(stage):
            return distributed.on_main(work) if alone else work()

    @contextmanager
    def _noted(self, stage: Stage) -> Iterator[None]:
        self.run.begin(stage)
        try:
            with self.manifest.stage(stage):
                yield
        finally:
            self.manifest.record("data", self.facts())
            self.run.write_json("manifest.json", self.manifest.as_dict())
        self.run.mark(stage)
        log.info("%s: %s, %.1f s", self.task, stage, self.manifest.seconds(stage))
