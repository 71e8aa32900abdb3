"""The run directory: found again by the configuration's hash, written atomically, truthful after a crash."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from lowrank_kit.config import RunConfig
from lowrank_kit.errors import NO_PLACE, ConfigError, LowRankKitError
from lowrank_kit.files import PARTIAL, read_json, read_yaml, write_whole
from lowrank_kit.lock import HEARTBEAT_SECONDS, Lock
from lowrank_kit.runs.checksums import Checksum, checksums
from lowrank_kit.runs.inputs import INPUTS_FILE, Inputs, changes
from lowrank_kit.runs.status import END, STATUS_FILE, State, Status, read_status

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.yaml"
# What the stages leave; a run directory may hold other people's files too.
WORK = (
    INPUTS_FILE,
    MANIFEST_FILE,
    "plan.json",
    "plots",
    "checkpoint",
    "recovered",
    "checkpoints",
    "adapter",
    "history.json",
    "benchmarks",
    "samples",
    "windows",
    "energy.json",
    "effects.json",
    "results.json",
)

# Why a folder can be no run directory, but for a full disk and the like, which pass.
_UNWRITABLE = (*NO_PLACE, errno.EROFS, errno.EACCES, errno.EPERM)

# Of the trainer, which tells its own halves; and what every process adds to.
_NOT_SUMMED = ("checkpoints", MANIFEST_FILE)


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

    def __init__(self, path: Path, resume: bool = True) -> None:
        """Hold `path`; raises `LowRankKitError` if a living process already does.

        With ``resume`` also where a file of earlier work is gone or was altered, and `DamagedFileError` for a status
        that cannot be read.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / "lock.json")
        if (holder := self._lock.try_acquire()) is not None:
            raise LowRankKitError(f"{path} is in use by {holder}; wait for it, end it, or choose another run.dir")
        try:
            earlier = read_status(path, thorough=True) if resume else None
            if earlier is not None and earlier.state == "damaged":
                raise LowRankKitError(
                    f"{path} is not as the run left it: {earlier.error}. Restore that from a copy, choose another "
                    "run.dir, or start over with run.resume=false"
                )
        except BaseException:
            self._lock.release()
            raise
        self.was_complete = earlier is not None and earlier.state == "complete"
        """Whether an earlier process ended the run as complete."""
        self._write_lock = threading.Lock()
        self._closing = threading.Event()
        files = {stage: sums for stage, sums in earlier.files.items() if stage != END} if earlier else {}
        self._status = Status("running", stages_done=earlier.stages_done if earlier else (), files=files)

    @classmethod
    def open(cls, config: RunConfig, inputs: Callable[[], Inputs] | None = None) -> "RunDirectory":
        """Open the directory of this configuration, `run.dir` or ROOT/NAME; find earlier work in it.

        With `run.resume=false` that work is removed. Raises `ConfigError` if `run.dir` holds a run of
        another configuration, naming the keys that differ, or of other ``inputs``, naming those; `LowRankKitError` if
        a process works there, or if a file of earlier work is gone or was altered.
        Of several processes of one job the first holds the directory, and the others follow it.
        """
        # Imported only now: to read a run takes no torch.
        from lowrank_kit.distributed import on_main

        opened: list[RunDirectory] = []

        def hold() -> tuple[str, ...]:
            try:
                opened.append(cls._hold(config, inputs))
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                opened.append(cls._show(config, inputs, error))
            return opened[0]._status.stages_done

        done = on_main(hold)
        return opened[0] if opened else FollowedRun(run_path(config), done)

    @classmethod
    def _hold(cls, config: RunConfig, inputs: Callable[[], Inputs] | None) -> "RunDirectory":
        run = cls(run_path(config), config.run.resume)
        try:
            run._check_configuration(config)
            made_from = None if inputs is None else inputs()
            if not config.run.resume:
                run.remove(*WORK)
            if made_from is not None:
                run._check_inputs(made_from)
            run._remove_leftovers()
            # First, so that no state says complete of a configuration that was written anew.
            run._update()
            run.write_text(CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config.resolved())))
            if made_from is not None and not (run.path / INPUTS_FILE).is_file():
                run.write_json(INPUTS_FILE, made_from)
        except BaseException:
            run._lock.release()
            raise
        return run

    @classmethod
    def _show(cls, config: RunConfig, inputs: Callable[[], Inputs] | None, error: OSError) -> "RunDirectory":
        """A finished run in a folder that cannot be written to; nothing is left to do in it."""
        path = run_path(config)
        refusal = ConfigError(f"{path} cannot be written to: {error.strerror}; choose another run.dir")
        # There is nothing to read where a folder of it is a file, or its name too long.
        status = read_status(path, thorough=True) if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else None
        wanted = status is not None and set(config.run.stages) <= set(status.stages_done)
        if status is None or status.state != "complete" or not wanted or not config.run.resume:
            raise refusal from error
        run = FollowedRun(path, status.stages_done)
        run._check_configuration(config)
        if inputs is not None:
            run._check_inputs(inputs())
        return run

    def _check_configuration(self, config: RunConfig) -> None:
        file = self.path / CONFIG_FILE
        if not file.is_file():
            return
        remedy = "choose another run.dir, or remove the folder if nothing in it is wanted"
        earlier = flatten(read_yaml(file, remedy))
        now = flatten(identity(config))
        keys = [k for k in {**now, **earlier} if not re.match(r"(run|tracker|runtime)\.", k)]
        if changed := [k for k in keys if earlier.get(k) != now.get(k)]:
            lines = [f"{k}: {earlier.get(k)!r} there, {now.get(k)!r} now" for k in changed]
            heading = f"{self.path} holds a run of another configuration; choose another run.dir. Different:"
            raise ConfigError("\n  ".join([heading, *lines]))

    def _check_inputs(self, now: Inputs) -> None:
        """Raise `ConfigError` where earlier work was done with other rows or weights."""
        earlier = read_json(self.path / INPUTS_FILE, dict)
        ways = "choose another run.dir, or start over with run.resume=false"
        if earlier is None and self._status.stages_done:
            raise ConfigError(f"{self.path} does not say which rows and weights its work was done with: {ways}")
        if earlier is not None and (changed := list(changes(earlier, now))):
            heading = f"{self.path} holds work that was done with other rows or weights; {ways}. Changed since:"
            raise ConfigError("\n  ".join([heading, *changed]))

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left half: this process alone holds the folder."""
        ours = "|".join(map(re.escape, (*WORK, STATUS_FILE, CONFIG_FILE)))
        # A folder of `TemporaryDirectory`, of `write_folder`, a file of `write_atomically`.
        half = re.compile(rf"\.({ours})(-\w{{8}}|\.tmp|\.old|\..+{re.escape(PARTIAL)})")
        self.remove(*(entry.name for entry in self.path.iterdir() if half.fullmatch(entry.name)))
        for folder in ("benchmarks", "samples", "windows"):
            for file in (self.path / folder).rglob(f".*{PARTIAL}"):
                file.unlink()

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
        try:
            if error is None:
                besides = (CONFIG_FILE, *(name for name in WORK if name != "checkpoints"))
                self._update(state="complete", stage=None, files=self._with_sums_of(END, besides))
                return
            state: State = "failed" if isinstance(error, Exception) else "interrupted"
            # On a full disk it stays "running" of a process that is gone, which is read as interrupted.
            with suppress(OSError):
                self._update(state=state, error=f"{type(error).__name__}: {error}")
        finally:
            self._lock.release()

    def done(self, stage: str) -> bool:
        """Whether this stage was finished, now or by an earlier process."""
        return stage in self._status.stages_done

    def forget(self, stage: str, *names: str) -> None:
        """Let a stage count as not done, and remove the files that told of it."""
        files = {done: sums for done, sums in self._status.files.items() if done != stage}
        self._update(stages_done=tuple(s for s in self._status.stages_done if s != stage), files=files)
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
        left = tuple(name for name in WORK if name not in _NOT_SUMMED)
        files = self._with_sums_of(stage, left)
        self._update(stages_done=tuple(dict.fromkeys([*self._status.stages_done, stage])), files=files)

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
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(target)
            raise
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _with_sums_of(self, stage: str, names: Iterable[str]) -> dict[str, Mapping[str, Checksum]]:
        """The checksums so far, and for ``stage`` those of the files that are new or were written again."""
        known = {name: one for sums in self._status.files.values() for name, one in sums.items()}
        now = checksums(self.path, names, known)
        kept = {
            done: {name: one for name, one in sums.items() if name not in now or now[name] == one}
            for done, sums in self._status.files.items()
        }
        return {**kept, stage: {name: one for name, one in now.items() if known.get(name) != one}}

    def _update(self, **changes: Any) -> None:
        with self._write_lock:
            self._status = replace(self._status, updated=time.time(), **changes)
            self.write_json(STATUS_FILE, asdict(self._status))

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            # The disk may be full for a while.
            with suppress(OSError):
                self._update()


class FollowedRun(RunDirectory):
    """The run's folder in the other processes of a job: they read it, know what is done, and write nothing there."""

    def __init__(self, path: Path, stages_done: tuple[str, ...]) -> None:
        self.path, self.was_complete = path, True
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

    def _with_sums_of(self, stage: str, names: Iterable[str]) -> dict[str, Mapping[str, Checksum]]:
        """Left to the first process."""
        return {}

    def _update(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)


def write_atomically(target: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_whole(target, write)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    items = (flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: leaf for part in items for key, leaf in part.items()}
