"""Machines that refuse: full and read-only disks, little memory, few handles, no home, others at work, damaged caches.

Nothing is lost, nothing half-written looks whole, a status is true, and one message says what to do.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trial import Machine, left, litter

from lowrank_kit.runs.status import read_status

COMPRESSION: dict[str, tuple[str, ...]] = {
    "evaluation": ("none",),
    "one block at a time": ("svd_llm", "runtime=streamed", "method.rank_multiple=1"),
    "refinement": ("svd_llm", "correction=refine", "method.correction.passes=1", "method.rank_multiple=1"),
    "gradients": ("kfac_svd", "method.rank_multiple=1"),
    "recovery": (
        *("svd_llm", "method.rank_multiple=1"),
        *("recovery=lora", "recovery.data=text", "train.max_steps=4", "train.save_every=2"),
    ),
    "sweep": ("svd", "method.rank_multiple=1", "-m", "method.ratio=0.3,0.4"),
}
TRAINING = {
    "adapter": ("method=lora", "train.max_steps=4", "train.save_every=2"),
    "all weights": ("method=full_ft", "train.max_steps=4", "train.save_every=2"),
}
KINDS = [*COMPRESSION, *TRAINING]
Command = Callable[[str, Path], list[str]]


@pytest.fixture
def command(language_arguments, arguments) -> Command:
    """The words of a kind of run, in a folder of its own."""

    def build(kind: str, root: Path, *more: str) -> list[str]:
        if kind in TRAINING:
            words = [word for word in arguments(*TRAINING[kind]) if word != "method.rank=2"]
        else:
            method, *words = COMPRESSION[kind]
            words = language_arguments(*words, method=method)
        return ["run", *words, f"run.root={root}", *more]

    return build


@pytest.fixture
def kinds(some) -> list[str]:
    """In the suite the quickest alone."""
    return list(some(KINDS, full=len(KINDS), short=0)) or ["evaluation"]


class Disk:
    """A disk of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mount("size=500m")

    def _mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def used(self) -> int:
        """In KiB."""
        now = os.statvfs(self.path)
        return (now.f_blocks - now.f_bfree) * now.f_frsize // 1024

    def files_used(self) -> int:
        now = os.statvfs(self.path)
        return now.f_files - now.f_ffree


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a disk wants root")
    folder = tmp_path / "disk"
    folder.mkdir()
    found = Disk(folder)
    yield found
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def states(root: Path) -> set[str]:
    return {status.state for f in root.rglob("status.json") if (status := read_status(f.parent))}


def one_message(said: str, *words: str) -> None:
    """That beside its log a command says one thing, which has these words in it."""
    assert "Traceback" not in said, said
    log = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) ")
    lines = [line for line in said.splitlines() if line and not log.match(line)]
    # Those of a sweep are in its log, and behind it a table.
    if not any(line.startswith("sweep: ") for line in lines) and "ERROR job" not in said:
        assert len(lines) == 1, said
    assert all(word in said for word in words), said


def as_they_were(folder: Path) -> dict[str, Any]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(what, disk, command, trials, kinds, some, tmp_path):
    shares = sorted(some([0.01, 0.1, 0.3, 0.5, 0.7, 0.9], full=6 if what == "bytes" else 3, short=1))
    for kind in kinds:
        root, cache = disk.path / kind, disk.path / f"{kind} cache"
        before = disk.used(), disk.files_used()
        # Drawn in full where blocks come and go, for a figure may be what finds no room.
        machine = Machine(draws=kind == "one block at a time")
        assert trials.run(command(kind, tmp_path / kind), tmp_path / f"{kind} cache", machine) == 0, trials.said
        assert trials.run(command(kind, root), cache, machine) == 0, trials.said
        most = disk.used() - before[0], disk.files_used() - before[1]
        expected = left(tmp_path / kind)
        assert left(root) == expected
        subprocess.run(["rm", "-r", str(root), str(cache)], check=True)
        for share in shares:
            size = f"size={before[0] + max(4, int(share * most[0]))}k"
            disk.change(size if what == "bytes" else f"nr_inodes={before[1] + max(2, int(share * most[1]))}")
            status = trials.run(command(kind, root), cache, machine)
            disk.change("size=500m,nr_inodes=100k")
            # What a finished part no longer needs makes room for the next: the last of them may be enough.
            if status == 0:
                break
            assert status == 1, (kind, share, trials.said)
            one_message(trials.said, "No space left on device", "room")
            assert litter(disk.path, goes_on=True) == [], (kind, share)
            assert states(root) <= {"failed", "interrupted", *({"complete"} if kind == "sweep" else ())}, (kind, share)
        assert trials.run(command(kind, root), cache, machine) == 0, (kind, trials.said)
        assert left(root) == expected
        assert litter(disk.path) == []
        assert states(root) == {"complete"}


def test_a_limit_on_the_size_of_files_is_told(command, trials, kinds, some, tmp_path):
    for kind in kinds:
        for most in some([3_000, 12_000, 40_000], full=3, short=1):
            root, cache = tmp_path / f"{kind} {most}", tmp_path / f"{kind} {most} cache"
            status = trials.run(command(kind, root), cache, Machine({resource.RLIMIT_FSIZE: most}))
            if status == 0:
                continue
            assert status == 1, trials.said
            one_message(trials.said, "File too large", "ulimit -f")
            assert litter(root, goes_on=True) + litter(cache) == []
            assert states(root) <= {"failed", "interrupted", *({"complete"} if kind == "sweep" else ())}
            assert trials.run(command(kind, root), cache) == 0, trials.said
            assert litter(root) + litter(cache) == []


@pytest.mark.parametrize("what", [resource.RLIMIT_NOFILE, resource.RLIMIT_AS], ids=["handles", "memory"])
def test_few_handles_and_little_memory_are_told(what, command, trials, kinds, some, tmp_path):
    limits = [8, 14, 24] if what == resource.RLIMIT_NOFILE else [2**20, 2**24, 2**26]
    words = "ulimit -n" if what == resource.RLIMIT_NOFILE else "memory"
    for kind in kinds:
        for most in some(limits, full=len(limits), short=1):
            root, cache = tmp_path / f"{kind} {most}", tmp_path / f"{kind} {most} cache"
            status = trials.run(command(kind, root), cache, Machine({what: most}))
            if status == 0:
                continue
            assert status == 1, (kind, most, trials.said)
            one_message(trials.said, words)
            assert litter(root, goes_on=True) + litter(cache) == [], (kind, most)
            assert states(root) <= {"failed", "interrupted", *({"complete"} if kind == "sweep" else ())}
            assert trials.run(command(kind, root), cache) == 0, trials.said


def test_a_new_interpreter_with_little_memory_says_so(command, environment, some, full, tmp_path):
    if not full:
        pytest.skip("in `make campaign`: every interpreter imports torch anew")
    for megabytes in (100, 200, 400, 800, 1600, 3200):
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2)"
        code = f"{limit}; from lowrank_kit.commands import main; import sys; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *command("evaluation", tmp_path / f"{megabytes}")],
            env=environment | {"LOWRANK_KIT_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode in (0, 1), (megabytes, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr, (megabytes, done.stderr)
        assert done.returncode == 0 or "memory" in done.stderr, (megabytes, done.stderr)


@pytest.mark.draws
def test_a_finished_run_is_read_from_a_read_only_disk(disk, command, trials, questions_folder, kinds, tmp_path):
    machine, cache, out = Machine(draws=True), disk.path / "cache", tmp_path / "out"
    for kind in kinds:
        assert trials.run(command(kind, disk.path / kind), cache, machine) == 0, trials.said
    answers = (
        *("task=smoke", "task.calibrate_on=null", f"data.root={questions_folder}"),
        f"run.dir={disk.path / 'answers'}",
    )
    answered = [word for word in command("evaluation", disk.path) if not word.startswith(("task", "~task"))]
    assert trials.run([*answered, *answers], cache, machine) == 0, trials.said
    before = as_they_were(disk.path)
    disk.change("ro")
    for kind in kinds:
        assert trials.run(command(kind, disk.path / kind), cache, machine) == 0, (kind, trials.said)
        # With other folders and the same cache, which has it all.
        assert trials.run(command(kind, tmp_path / kind), cache, machine) == 0, (kind, trials.said)
        assert left(tmp_path / kind) == left(disk.path / kind)
    runs = sorted({f.parent for f in disk.path.rglob("status.json")})
    commands = [["report", str(disk.path), "--output", str(out / "report")]]
    commands += [["inspect", str(run)] for run in runs]
    commands += [["diff", str(runs[0]), str(runs[-1])]]
    commands += [["compare", str(disk.path / "answers"), str(disk.path / "answers")]]
    for number, run in enumerate(runs):
        causal = "perplexity" in run.name and "none" not in run.name
        for form in ("dense", "lowrank", "serve") if causal else ("lora",) if (run / "adapter").is_dir() else ():
            commands.append(["export", str(run), "--format", form, "--output", str(out / f"{number}-{form}")])
    for words in commands:
        assert trials.run(words, cache, machine) == 0, (words, trials.said)
        assert "Traceback" not in trials.said, trials.said
    disk.change("rw")
    # A cache's entry says when it was used last, where it can.
    assert as_they_were(disk.path) == before


def test_a_read_only_disk_takes_no_run(disk, command, trials, kinds, tmp_path):
    for kind in kinds:
        begun = ("run.stages=[calibrate]",) if kind != "sweep" else ()
        if begun:
            assert trials.run(command(kind, disk.path / kind, *begun), tmp_path / "cache") == 0, trials.said
        before = as_they_were(disk.path)
        disk.change("ro")
        status = trials.run(command(kind, disk.path / kind), tmp_path / "cache")
        assert status == (1 if kind == "sweep" else 2), (kind, trials.said)
        one_message(trials.said, "Read-only file system", str(disk.path / kind))
        # Nothing is known of it yet: the cache is.
        status = trials.run(command(kind, tmp_path / f"{kind} here"), disk.path / "no cache")
        assert status == 1, (kind, trials.said)
        one_message(trials.said, "Read-only file system", "no cache")
        assert litter(tmp_path / f"{kind} here", goes_on=True) == []
        assert states(tmp_path / f"{kind} here") <= {"failed"}
        disk.change("rw")
        assert as_they_were(disk.path) == before
        assert trials.run(command(kind, disk.path / kind), tmp_path / "cache") == 0, trials.said


def test_a_place_that_is_none_is_the_commands_mistake(command, trials, some, full, tmp_path):
    if not full:
        pytest.skip("in `make campaign`: sixteen commands")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    ok = tmp_path / "ok"
    assert trials.run(command("evaluation", ok), tmp_path / "cache") == 0, trials.said
    model = next(w.removeprefix("model.path=") for w in command("evaluation", ok) if w.startswith("model.path="))
    places = [tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300), tmp_path / "loop/below"]
    for place in some(places, full=4, short=1):
        named = (place.parent if place.name == "below" else place).name[:50]
        for words in (
            command("evaluation", place),
            command("evaluation", ok, f"run.dir={place}"),
            ["report", str(ok), "--output", str(place)],
            ["export", model, "--format", "dense", "--output", str(place)],
            ["eora", str(place), "--bits", "8", *command("evaluation", ok)[2:]],
        ):
            assert trials.run(words, tmp_path / "cache") == 2, (words, trials.said)
            one_message(trials.said, named)
        status = trials.run(command("evaluation", tmp_path / "other"), place)
        assert status == 2, (place, trials.said)
        one_message(trials.said, named)
    assert (tmp_path / "file").read_text() == "mine"


def test_without_a_home_a_run_needs_a_cache_and_no_more(command, environment, disk, full, tmp_path):
    disk.change("ro")
    bare = {name: value for name, value in environment.items() if name not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    homes: list[dict[str, str]] = [{}, {"HOME": str(disk.path)}, {"HOME": "/nowhere"}]
    for number, home in enumerate(homes if full else homes[1:2]):
        root = tmp_path / f"{number}"
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_kit", *command("evaluation", root)],
            env=bare | home | {"LOWRANK_KIT_CACHE": str(tmp_path / f"cache {number}")}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert states(root) == {"complete"}
    assert not Path("/nowhere").exists()


def test_a_home_that_cannot_be_written_to_is_told(command, trials, disk, tmp_path):
    disk.change("ro")
    words = command("evaluation", tmp_path / "runs")
    # An empty variable is as none.
    assert trials.run(words, Path(), HOME=str(disk.path), LOWRANK_KIT_CACHE="") == 1, trials.said
    one_message(trials.said, str(disk.path), "Read-only file system", "LOWRANK_KIT_CACHE")


@pytest.mark.draws
def test_files_obey_the_umask(command, trials, kinds, some, tmp_path):
    for umask in some([0o077, 0o002, 0o027], full=3, short=1):
        root, cache, out = (tmp_path / f"{umask:o} {name}" for name in ("runs", "cache", "out"))
        machine = Machine(umask=umask)
        for kind in kinds:
            assert trials.run(command(kind, root / kind), cache, machine) == 0, trials.said
        runs = sorted({f.parent for f in root.rglob("status.json")})
        commands = [["report", str(root), "--output", str(out / "report")]]
        eora = [word for word in command("evaluation", root)[2:] if not word.startswith(("run.", "method"))]
        commands.append(["eora", str(out / "eora"), "--bits", "8", "--rank", "2", *eora])
        for number, run in enumerate(runs):
            form = "dense" if (run / "checkpoint").is_dir() and "perplexity" in run.name else "lora"
            if (run / "adapter").is_dir() or form == "dense":
                commands.append(["export", str(run), "--format", form, "--output", str(out / f"{number}")])
        for words in commands:
            assert trials.run(words, cache, machine) == 0, (words, trials.said)
        found = [path for folder in (root, cache, out) for path in (folder, *folder.rglob("*"))]
        wrong = {
            str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
            for path in found
            if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
        }
        assert not wrong


def test_two_processes_with_one_command(command, trials, kinds, tmp_path):
    for kind in kinds:
        assert trials.run(command(kind, tmp_path / "whole" / kind), tmp_path / f"{kind} whole cache") == 0, trials.said
        root, cache = tmp_path / kind, tmp_path / f"{kind} cache"
        both = [trials.start(command(kind, root), cache) for _ in range(2)]
        for process in both:
            process.join(240)
        codes = sorted(process.exitcode for process in both)
        # One may have come when the other was done.
        assert codes in ([0, 1], [0, 0]), (kind, codes, trials.said)
        assert "Traceback" not in trials.said
        if codes == [0, 1]:
            assert re.search(r"in use by process \d+ on ", trials.said), trials.said
        assert states(root) == {"complete"}
        assert left(root) == left(tmp_path / "whole" / kind)
        assert litter(root) + litter(cache) == []


def test_two_processes_with_one_cache(command, trials, kinds, tmp_path):
    for kind in kinds:
        cache = tmp_path / f"{kind} cache"
        roots = [tmp_path / f"{kind} {number}" for number in range(2)]
        both = [trials.start(command(kind, root), cache) for root in roots]
        for process in both:
            process.join(240)
            assert process.exitcode == 0, (kind, trials.said)
        assert left(roots[0]) == left(roots[1])
        assert litter(roots[0]) + litter(roots[1]) + litter(cache) == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "a flipped bit": lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    "zeros": lambda whole: bytes(len(whole)),
    "nothing": lambda whole: b"",
    "something else": lambda whole: b"\xff\xfe not JSON {",
}


def test_damaged_entries_of_the_cache_are_made_again(command, trials, kinds, some, tmp_path):
    for kind in kinds:
        cache = tmp_path / f"{kind} cache"
        assert trials.run(command(kind, tmp_path / kind), cache) == 0, trials.said
        files = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
        assert files
        for number, what in enumerate(some(list(DAMAGES), full=len(DAMAGES), short=1)):
            for file, whole in files.items():
                file.write_bytes(DAMAGES[what](whole))
            root = tmp_path / f"{kind} {number}"
            assert trials.run(command(kind, root), cache) == 0, (kind, what, trials.said)
            assert left(root) == left(tmp_path / kind), (kind, what)
            assert "made again" in trials.said, (kind, what, trials.said)
            # Whole again: figures may lie in another order, for they are measured anew.
            assert {file for file in cache.rglob("*") if file.is_file()} == set(files)
            assert trials.run(command(kind, tmp_path / f"{kind} {number} again"), cache) == 0, trials.said
            assert "made again" not in trials.said, (kind, what)
            assert litter(cache) == []


def test_an_entry_without_its_key_is_one_again(command, trials, tmp_path):
    cache = tmp_path / "cache"
    assert trials.run(command("evaluation", tmp_path / "runs"), cache) == 0, trials.said
    [key] = cache.glob("*/*/key.json")
    whole = json.loads(key.read_text())
    key.unlink()
    assert trials.run(command("evaluation", tmp_path / "again"), cache) == 0, trials.said
    assert trials.run(["cache"], cache) == 0
    assert not key.exists() or json.loads(key.read_text()) == whole
