"""The run directory: found again by the configuration's hash, written atomically, truthful after a crash."""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil
from omegaconf import OmegaConf

from lowrank_kit.config import RunConfig
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.lock import HEARTBEAT_SECONDS, SILENCE_SECONDS, Lock, process_alive

# What the stages leave; a run directory may hold other people's files too.
WORK = (
    "manifest.json",
    "plan.json",
    "plots",
    "checkpoint",
    "recovered",
    "checkpoints",
    "adapter",
    "history.json",
    "benchmarks",
    "samples",
    "energy.json",
    "effects.json",
    "results.json",
)

State = Literal["running", "complete", "failed", "interrupted"]


@dataclass(frozen=True)
class Status:
    """Content of `status.json`: what the run is doing, and which process does it. Times in Unix seconds."""

    state: State
    stage: str | None = None
    stages_done: tuple[str, ...] = ()
    error: str | None = None
    pid: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    def process_alive(self) -> bool:
        """Whether the recorded process still runs; from another host, whether it was heard of lately."""
        if self.hostname != socket.gethostname():
            return time.time() - self.updated < SILENCE_SECONDS
        return process_alive(self.pid, self.process_started)


def read_status(path: Path | str) -> Status | None:
    """Read a run directory's status; None if there is none.

    A run that says `running` but whose process is gone (SIGKILL, power failure) is reported as `interrupted`.
    """
    file = Path(path) / "status.json"
    if not file.is_file():
        return None
    raw = json.loads(file.read_text())
    status = Status(**{**raw, "stages_done": tuple(raw["stages_done"])})
    alive = status.state != "running" or status.process_alive()
    return status if alive else replace(status, state="interrupted")


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the resolved configuration without what cannot change results: `run`, `tracker` and `runtime`."""
    return {key: value for key, value in config.resolved().items() if key not in ("run", "tracker", "runtime")}


def run_path(config: RunConfig) -> Path:
    """Return where a configuration's run directory is: `run.dir`, or ROOT/NAME."""
    return Path(config.run.dir) if config.run.dir else Path(config.run.root) / run_name(config)


def without_seed(plain: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return what runs that differ in their seed alone have in common, and the seed."""
    rest = {**plain, "method": {**plain["method"]}}
    seed = rest.pop("seed")
    # A method's own seed follows the run's unless it was chosen apart.
    if rest["method"].get("seed") == seed:
        del rest["method"]["seed"]
    return rest, seed


def run_name(config: RunConfig) -> str:
    """Return METHOD-MODEL-TASK-HASH-sSEED; runs that differ in their seed alone share the hash."""
    plain, seed = without_seed(identity(config))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
    words = (str(plain[section]["name"]) for section in ("method", "model", "task"))
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "_", word).strip("_") for word in words)
    return f"{slug[:80]}-{digest}-s{seed}"


class RunDirectory:
    """One run's folder, held by this process alone from `open` until the `with` block ends.

    The block's end sets the state: complete, failed (with the error) or interrupted (Ctrl-C, exit).
    """

    def __init__(self, path: Path) -> None:
        """Hold `path`; raises `LowRankKitError` if a living process already does."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / "lock.json")
        if (holder := self._lock.try_acquire()) is not None:
            raise LowRankKitError(f"{path} is in use by {holder}; wait for it, end it, or choose another run.dir")
        earlier = read_status(path)
        self.was_complete = earlier is not None and earlier.state == "complete"
        """Whether an earlier process ended the run as complete."""
        self._write_lock = threading.Lock()
        self._closing = threading.Event()
        self._status = Status("running", stages_done=earlier.stages_done if earlier else ())

    @classmethod
    def open(cls, config: RunConfig) -> "RunDirectory":
        """Open the directory of this configuration, `run.dir` or ROOT/NAME; find earlier work in it.

        With `run.resume=false` that work is removed. Raises `ConfigError` if `run.dir` holds a run of
        another configuration, naming the keys that differ, and `LowRankKitError` if a process works there.
        Of several processes of one job the first holds the directory, and the others follow it.
        """
        # Imported only now: to read a run takes no torch.
        from lowrank_kit.distributed import on_main

        opened: list[RunDirectory] = []

        def hold() -> tuple[str, ...]:
            opened.append(cls._hold(config))
            return opened[0]._status.stages_done

        done = on_main(hold)
        return opened[0] if opened else FollowedRun(run_path(config), done)

    @classmethod
    def _hold(cls, config: RunConfig) -> "RunDirectory":
        run = cls(run_path(config))
        try:
            run._check_configuration(config)
        except BaseException:
            run._lock.release()
            raise
        if not config.run.resume:
            run._status = replace(run._status, stages_done=())
            run.remove(*WORK)
        run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.resolved())))
        run._update()
        return run

    def _check_configuration(self, config: RunConfig) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            return
        earlier = flatten(OmegaConf.to_container(OmegaConf.load(file)))
        now = flatten(identity(config))
        keys = [k for k in {**now, **earlier} if not re.match(r"(run|tracker|runtime)\.", k)]
        if changed := [k for k in keys if earlier.get(k) != now.get(k)]:
            lines = [f"{k}: {earlier.get(k)!r} there, {now.get(k)!r} now" for k in changed]
            heading = f"{self.path} holds a run of another configuration; choose another run.dir. Different:"
            raise ConfigError("\n  ".join([heading, *lines]))

    def __enter__(self) -> "RunDirectory":
        """Start the heartbeat."""
        self._update()
        threading.Thread(target=self._beat, name="run-heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record how the run ended and give the directory back."""
        self._closing.set()
        if error is None:
            self._update(state="complete", stage=None)
        else:
            state: State = "failed" if isinstance(error, Exception) else "interrupted"
            self._update(state=state, error=f"{type(error).__name__}: {error}")
        self._lock.release()

    def done(self, stage: str) -> bool:
        """Whether this stage was finished, now or by an earlier process."""
        return stage in self._status.stages_done

    def forget(self, stage: str, *names: str) -> None:
        """Let a stage count as not done, and remove the files that told of it."""
        self._update(stages_done=tuple(s for s in self._status.stages_done if s != stage))
        self.remove(*names)

    def remove(self, *names: str) -> None:
        """Remove files and folders of this run, if they are there."""
        for path in (self.path / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin(self, stage: str) -> None:
        """Record which stage is being worked on."""
        self._update(stage=stage)

    def mark(self, stage: str) -> None:
        """Record that a stage is finished; call it after the stage's files are in place."""
        self._update(stages_done=tuple(dict.fromkeys([*self._status.stages_done, stage])))

    def write_text(self, name: str, text: str) -> Path:
        """Write a file whole or not at all; returns its path."""
        target = self.path / name
        write_atomically(target, text)
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON whole or not at all; returns its path. NaN and infinity are refused (`ValueError`)."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    @contextmanager
    def write_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty folder; if the block succeeds it becomes `name`, replacing an earlier one."""
        target = self.path / name
        temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old"))
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _update(self, **changes: Any) -> None:
        with self._write_lock:
            self._status = replace(self._status, updated=time.time(), **changes)
            self.write_json("status.json", asdict(self._status))

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            self._update()


class FollowedRun(RunDirectory):
    """The run's folder in the other processes of a job: they read it, know what is done, and write nothing there."""

    def __init__(self, path: Path, stages_done: tuple[str, ...]) -> None:
        self.path = path
        self._status = Status("running", stages_done=stages_done)

    def __enter__(self) -> "FollowedRun":
        """Nothing to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """The first process tells how the run ended."""

    def remove(self, *names: str) -> None:
        """Left to the first process."""

    def write_text(self, name: str, text: str) -> Path:
        """Left to the first process."""
        return self.path / name

    @contextmanager
    def write_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty folder that is thrown away."""
        with tempfile.TemporaryDirectory(prefix="lowrank_kit-") as folder:
            yield Path(folder)

    def _update(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)


def write_atomically(target: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    items = (flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: leaf for part in items for key, leaf in part.items()}
