"""Checksums of the files that a run left: what is gone or was altered since is named."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_kit.files import sha256


@dataclass(frozen=True)
class Checksum:
    """SHA-256 of a file, its size in bytes and its modification time."""

    sha256: str
    size: int
    mtime_ns: int


def checksums(folder: Path, names: Iterable[str], known: Mapping[str, Checksum]) -> dict[str, Checksum]:
    """Return the checksums of all files that are, or lie below, ``folder/name``, by their path in ``folder``.

    A file whose size and time are those in ``known`` is not read again.
    """
    found = {}
    for file in _files(folder, names):
        name = file.relative_to(folder).as_posix()
        same = name in known and _unchanged(file, known[name])
        found[name] = known[name] if same else _checksum(file)
    return found


def differing(folder: Path, sums: Mapping[str, Checksum], thorough: bool) -> list[str]:
    """Say of every file that is no longer what it was: ``results.json is gone``, ``results.json was altered``.

    A file whose size and time are unchanged is read only if ``thorough``: checkpoints are large.
    """
    found = []
    for name, recorded in sums.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is gone")
        elif (thorough or not _unchanged(file, recorded)) and _checksum(file).sha256 != recorded.sha256:
            found.append(f"{name} was altered")
    return found


def _files(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    for path in (folder / name for name in names):
        yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else ()
        if path.is_file():
            yield path


def _unchanged(file: Path, recorded: Checksum) -> bool:
    now = file.stat()
    return (now.st_size, now.st_mtime_ns) == (recorded.size, recorded.mtime_ns)


def _checksum(file: Path) -> Checksum:
    now = file.stat()
    return Checksum(sha256(file), now.st_size, now.st_mtime_ns)
