"""Entries of the cache: one folder a key, the least recently used removed when all exceed the limit."""

import logging
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lowrank_kit.errors import NO_PLACE, ConfigError, LowRankKitError
from lowrank_kit.files import write_whole

log = logging.getLogger(__name__)

LIMIT = "LOWRANK_KIT_CACHE_GB"
DEFAULT_LIMIT_GB = 50.0
KEY_FILE = "key.json"
LOCK_FILE = "lock.json"
# A process that reads an entry block by block must find all of them.
SPARED_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """One key's folder. ``used`` is when it was last read, written or worked in, in Unix seconds."""

    folder: Path
    size: int
    used: float


def limit_bytes() -> int:
    """The size that one cache may have: ``$LOWRANK_KIT_CACHE_GB`` (10^9 bytes each), 50 if unset.

    Raises `ConfigError` for what is not a number above 0.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT_GB)
    with suppress(ValueError):
        if (limit := float(text)) > 0:
            return int(limit * 1e9)
    raise ConfigError(f"{LIMIT}={text!r} is not a number of gigabytes above 0: for example {LIMIT}=50")


def open_entry(root: Path, digest: str, description: str) -> Path:
    """Return the folder of a key below ``root``, made if it is not there; ``description`` is the key as JSON.

    An entry that is there is not written to, so that one on a read-only disk can be read. Raises `LowRankKitError`, or
    `ConfigError` for a place that can be no folder, where one cannot be made.
    """
    folder = root / digest
    file = folder / KEY_FILE
    whole = description.encode()
    try:
        if not file.is_file() or file.read_bytes() != whole:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda path: path.write_bytes(whole))
    except OSError as error:
        kind = ConfigError if error.errno in NO_PLACE else LowRankKitError
        raise kind(
            f"the cache cannot have '{folder}': {error.strerror}; make room there, or name another folder by "
            "LOWRANK_KIT_CACHE"
        ) from error
    return folder


def touch(folder: Path) -> None:
    """Note that an entry is used."""
    with suppress(OSError):
        os.utime(folder / KEY_FILE)


def entries(root: Path) -> list[Entry]:
    """All entries below a folder, the least recently used first."""
    found = []
    for file in root.glob(f"*/{KEY_FILE}"):
        # Another process may be clearing.
        with suppress(FileNotFoundError):
            size = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
            used = file.stat().st_mtime
            with suppress(FileNotFoundError):
                # The heartbeat of whoever computes here, be it for days.
                used = max(used, (file.parent / LOCK_FILE).stat().st_mtime)
            found.append(Entry(file.parent, size, used))
    return sorted(found, key=lambda entry: entry.used)


def make_room(root: Path) -> None:
    """Remove the least recently used entries below ``root`` until they are within `limit_bytes`.

    Entries used in the last hour stay, for a process may be reading them.
    """
    known, limit = entries(root), limit_bytes()
    total = sum(entry.size for entry in known)
    for entry in known:
        if total <= limit or time.time() - entry.used < SPARED_SECONDS:
            break
        remove(entry)
        total -= entry.size
        log.info("cache: removed %s, the least recently used (%.2f GB)", entry.folder.name, entry.size / 1e9)
    log.info(
        "cache: %.2f GB of at most %.0f GB (%s) in %s; `python -m lowrank_kit.cache` lists and clears it",
        total / 1e9,
        limit / 1e9,
        LIMIT,
        root,
    )


def remove(entry: Entry) -> None:
    """Delete an entry; its key goes first, so that no half of it looks whole."""
    (entry.folder / KEY_FILE).unlink(missing_ok=True)
    shutil.rmtree(entry.folder, ignore_errors=True)
