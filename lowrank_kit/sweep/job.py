"""One job of a sweep, in whatever process: its configuration in the sweep's folder, its outcome beside it."""

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_kit.config import RunConfig, load
from lowrank_kit.config.plugins import let_here
from lowrank_kit.console import command, set_up_console
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.runs.directory import run_path, write_atomically


@dataclass(frozen=True)
class Outcome:
    """How a job ended, by its own word; a job that was killed leaves none."""

    state: Literal["complete", "failed"]
    run_dir: str
    seconds: float
    started: float
    hostname: str
    restarts: int
    error: str | None = None


class SweepFolder:
    """Where the jobs of a sweep find what to do and leave how it ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, number: int, config: RunConfig) -> None:
        """Write what job ``number`` is; the outcome of an earlier one that was another is removed."""
        resolved = config.resolved()
        if not self._config_file(number).is_file() or self._read(self._config_file(number)) != resolved:
            self._outcome_file(number).unlink(missing_ok=True)
            write_atomically(self._config_file(number), json.dumps(resolved, indent=2) + "\n")

    def config(self, number: int) -> RunConfig:
        """What job ``number`` is, as it was checked when the sweep began."""
        raw = self._read(self._config_file(number))
        let_here(raw["run"]["method_prefixes"])
        return load(raw)

    def outcome(self, number: int) -> Outcome | None:
        """How job ``number`` ended; None while it waits or runs, and for ever if it was killed."""
        file = self._outcome_file(number)
        return Outcome(**self._read(file)) if file.is_file() else None

    def log_file(self, number: int) -> Path:
        """What a job prints, where it is a process of its own on this machine."""
        return self.path / "jobs" / f"{number:04d}.log"

    def forget(self, number: int) -> None:
        """Remove an earlier outcome."""
        self._outcome_file(number).unlink(missing_ok=True)

    def run(self, number: int) -> Path:
        """Do job ``number`` in this process; returns its run directory and raises what the run raises."""
        self.forget(number)
        config, started = self.config(number), time.time()
        facts: dict[str, Any] = {
            "run_dir": str(run_path(config)),
            "started": started,
            "hostname": socket.gethostname(),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
        from lowrank_kit.pipeline import execute

        try:
            facts["run_dir"] = str(execute(config))
        except Exception as error:
            message = str(error) if isinstance(error, LowRankKitError) else f"{type(error).__name__}: {error}"
            self._end(number, Outcome("failed", seconds=time.time() - started, error=message, **facts))
            raise
        self._end(number, Outcome("complete", seconds=time.time() - started, **facts))
        return Path(facts["run_dir"])

    def _end(self, number: int, outcome: Outcome) -> None:
        write_atomically(self._outcome_file(number), json.dumps(asdict(outcome), indent=2) + "\n")

    def _config_file(self, number: int) -> Path:
        return self.path / "jobs" / f"{number:04d}.json"

    def _outcome_file(self, number: int) -> Path:
        return self.path / "jobs" / f"{number:04d}.outcome.json"

    def _read(self, file: Path) -> Any:
        return json.loads(file.read_text())


def main() -> None:
    """`python -m lowrank_kit.sweep.job FOLDER NUMBER`: one job, with the exit status of a run."""
    with command():
        set_up_console()
        folder, number = sys.argv[1:]
        print(f"run: {SweepFolder(Path(folder)).run(int(number))}", flush=True)


if __name__ == "__main__":
    main()
