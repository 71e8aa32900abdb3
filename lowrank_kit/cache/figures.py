"""Small figures, as JSON with a checksum: what is damaged is measured again."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtyping import Int64

from lowrank_kit import distributed
from lowrank_kit.cache.entry import LOCK_FILE, make_room, open_entry, touch
from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.deferred import Tensor
from lowrank_kit.files import write_whole
from lowrank_kit.lock import exclusively

log = logging.getLogger(__name__)

FIGURES_FILE = "figures.json"


def shared_figures(root: Path, key: StatisticsKey, what: str, measure: Callable[[], Any]) -> Any:
    """What ``measure`` gives, JSON-serialisable, once for all runs that share the cache ``root``.

    Of several processes that need it, one measures and the others wait. ``what`` says in messages what is measured.
    All processes of one job call it together.
    """
    folder = root / key.digest
    file = folder / FIGURES_FILE
    known = distributed.on_main(lambda: read_checked(file))
    if known is None:
        distributed.on_main(lambda: open_entry(root, key.digest, key.description))
        with distributed.held_by_main(exclusively(folder / LOCK_FILE, what)):
            known = distributed.on_main(lambda: read_checked(file))
            if known is None:
                known = measure()
                distributed.on_main(lambda: write_checked(file, known))
        # Before room is made: what took long to measure is not the least recently used.
        distributed.on_main(lambda: touch(folder))
        distributed.on_main(lambda: make_room(root))
    else:
        distributed.on_main(lambda: touch(folder))
    return known


def checksum(content: Any) -> str:
    """Return a hash (32 hex digits) of what is JSON-serialisable."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def content_hash(tokens: Int64[Tensor, "windows tokens"]) -> str:
    """Return a hash (64 hex digits) of windows of token ids, their shape and order."""
    return hashlib.sha256(f"{tuple(tokens.shape)} ".encode() + tokens.numpy().tobytes()).hexdigest()


def append_checked_line(file: Path, content: Any) -> None:
    """Add JSON-serialisable content with its checksum as one line of a file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps([checksum(content), content]) + "\n")


def read_checked_lines(file: Path) -> list[Any]:
    """Read what `append_checked_line` wrote; lines that are damaged or were never finished are left out."""
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(ValueError, TypeError):
            expected, content = json.loads(line)
            if checksum(content) == expected:
                found.append(content)
    return found


def write_checked(file: Path, content: Any) -> None:
    """Write JSON-serialisable content with its checksum."""
    text = json.dumps({"checksum": checksum(content), "content": content}, indent=1)
    write_whole(file, lambda path: path.write_text(text + "\n", "utf-8"))


def read_checked(file: Path) -> Any:
    """Read what `write_checked` wrote; None for a file that is absent or, with a warning, damaged."""
    try:
        whole = json.loads(file.read_bytes())
        if checksum(whole["content"]) == whole["checksum"]:
            return whole["content"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    log.warning("%s is damaged: it is not used and will be made again", file)
    return None
