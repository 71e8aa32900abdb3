"""What the parts of the campaign share. `make campaign` runs them in full, the ordinary suite a seeded part of each."""

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import pytest
import warm

# As the processes that are forked find it, too.
sys.path.append(str(Path(__file__).parent))
import trial

FULL = os.environ.get("LOWRANK_KIT_CAMPAIGN") == "full"
Case = TypeVar("Case")
PLAIN = trial.Machine()

# Tiny models and local rows, as the integration tests have them.
_loader = SourceFileLoader("integration_conftest", str(Path(__file__).parents[1] / "integration/conftest.py"))
_spec = spec_from_loader(_loader.name, _loader)
assert _spec is not None
_small = module_from_spec(_spec)
_loader.exec_module(_small)
checkpoint, texts_folder, rows_folder = _small.checkpoint, _small.texts_folder, _small.rows_folder
questions_folder = _small.questions_folder
arguments, language_arguments, composed = _small.arguments, _small.language_arguments, _small.composed
environment = _small.environment
_drawn_where_marked, _one_thread = _small._drawn_where_marked, _small._one_thread


@pytest.fixture(scope="module", autouse=True)
def _a_server_of_its_own() -> Iterator[None]:
    """What starts trials has imported our package, which processes of other tests in this worker must not have."""
    yield
    forkserver._forkserver._stop()
    warm.CONTEXT.set_forkserver_preload(warm.LIBRARIES)


@pytest.fixture(scope="session")
def some() -> Callable[..., Sequence[Case]]:
    """Cases of a part: ``full`` of them in a campaign, ``short`` in the suite, drawn by a fixed seed."""

    def draw(cases: Sequence[Case], *, full: int, short: int) -> Sequence[Case]:
        return random.Random(0).sample(cases, min(full if FULL else short, len(cases)))

    return draw


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether this is the campaign and not the suite."""
    return FULL


class Trials:
    """Commands in processes of their own, with a cache each; ``said`` is what the last one printed."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self._log, self._environment = log, environment

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self, words: Sequence[str], cache: Path, machine: trial.Machine = PLAIN, **more: str) -> BaseProcess:
        self._log.write_text("")
        # Who drops its rights writes there, too.
        self._log.chmod(0o666)
        return trial.start(words, self._log, self._environment | {"LOWRANK_KIT_CACHE": str(cache)} | more, machine)

    def run(self, words: Sequence[str], cache: Path, machine: trial.Machine = PLAIN, **more: str) -> int | None:
        process = self.start(words, cache, machine, **more)
        process.join(120)
        return process.exitcode


@pytest.fixture
def trials(environment, tmp_path) -> Trials:
    return Trials(tmp_path / "said", environment | {"COLUMNS": "300"})
