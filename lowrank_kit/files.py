"""Files of runs and caches: written whole or not at all, and read with distrust.

A file that is not whole is named, and none can run code or never end.
"""

import glob
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import TypeAdapter, ValidationError

from lowrank_kit.errors import LowRankKitError

MOST_BYTES = 2**28
DEEPEST = 100
PARTIAL = ".partial"
"""Ends the name of what is being written."""
RUN_REMEDY = "restore it from a copy, or start the run over with run.resume=false"


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``target`` and put it in its place: a reader finds all of it or nothing.

    Of one that fails nothing is left, and what processes of this host were killed over goes at the next try. An
    `OSError` names ``target`` where it names no file.
    """
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    partial = target.with_name(f".{target.name}.{host}.{os.getpid()}{PARTIAL}")
    for half in target.parent.glob(f".{glob.escape(target.name)}.{host}.*{PARTIAL}"):
        if not psutil.pid_exists(int(half.name.split(".")[-2])):
            half.unlink(missing_ok=True)
    try:
        write(partial)
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(partial)):
            error.filename, error.filename2 = str(target), None
        raise


def share(*files: Path) -> None:
    """Give files the permissions of any new one: safetensors writes for the owner alone, whatever the umask says."""
    for file in files:
        new = file.with_name(f".{file.name}.new")
        new.touch()
        file.chmod(new.stat().st_mode & 0o777)
        new.unlink()


class DamagedFileError(LowRankKitError):
    """A file is cut short, altered or of another kind than its name says; the message names it and the remedy."""


def damaged(file: Path, why: str, remedy: str = RUN_REMEDY) -> DamagedFileError:
    """Return the error for a file that cannot be used."""
    return DamagedFileError(f"'{file}' is damaged ({why}): {remedy}")


def read_json(file: Path, kind: type = object, remedy: str = RUN_REMEDY) -> Any:
    """Read JSON whose outermost value is a ``kind`` (dict, list); None if there is no such file.

    Raises `DamagedFileError` for anything else.
    """
    if (text := _text(file, remedy)) is None:
        return None
    value = _decoded(file, text, remedy)
    if not isinstance(value, kind):
        raise damaged(file, f"it holds a {type(value).__name__}, no {kind.__name__}", remedy)
    return value


def read_lines(file: Path, remedy: str = RUN_REMEDY) -> list[dict[str, Any]]:
    """Read JSON lines, a mapping each; raises `DamagedFileError`, naming the line, for anything else."""
    found = []
    for number, line in enumerate((_text(file, remedy) or "").splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(file, f"line {number} is no JSON", remedy) from error
        if not isinstance(value, dict):
            raise damaged(file, f"line {number} is no mapping", remedy)
        found.append(value)
    return found


def read_as(file: Path, content: Any, remedy: str = RUN_REMEDY) -> Any:
    """Read JSON as a type with annotations, a dataclass or a tuple of them; None if there is no such file.

    Raises `DamagedFileError` for anything else, naming the place in the file.
    """
    if (text := _text(file, remedy)) is None:
        return None
    return checked(content, _decoded(file, text, remedy), file, remedy)


def checked(content: Any, value: Any, file: Path, remedy: str = RUN_REMEDY) -> Any:
    """Return a value that was read as a type with annotations; raises `DamagedFileError` where it is none."""
    try:
        return TypeAdapter(content).validate_python(value)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        raise damaged(file, f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}", remedy) from error


def plain(text: str) -> str:
    """Return a text on one line, its control characters made visible: a terminal would obey them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_yaml(file: Path, remedy: str = RUN_REMEDY) -> dict[str, Any]:
    """Read a YAML mapping of plain values, without tags, anchors or aliases: a few aliases can stand for gigabytes.

    Raises `DamagedFileError` for anything else, and where there is no such file.
    """
    text = _text(file, remedy)
    if text is None:
        raise damaged(file, "it is no regular file", remedy)
    try:
        depth = 0
        # As libyaml reads it, ten times as fast as Python: a sweep has hundreds.
        for event in yaml.parse(text, yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise damaged(file, "it has an alias, which no run writes", remedy)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise damaged(file, f"it is nested more than {DEEPEST} levels deep", remedy)
        value = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark: yaml.Mark | None = getattr(error, "problem_mark", None)
        raise damaged(file, "no YAML" + (f", line {mark.line + 1}" if mark else ""), remedy) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise damaged(file, "it is no mapping of names", remedy)
    return value


def _decoded(file: Path, text: str, remedy: str) -> Any:
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise damaged(file, why, remedy) from error


def _finite(number: str) -> float:
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"{number} is no number of JSON")
    return value


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _text(file: Path, remedy: str) -> str | None:
    # Of a pipe or a device the end may never come.
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MOST_BYTES:
            raise damaged(file, f"it has more than {MOST_BYTES >> 20} MiB", remedy)
        return file.read_text("utf-8")
    except FileNotFoundError:
        # Another process may take it away at any time: a lock that is released, a cache that is cleared.
        return None
    except UnicodeDecodeError as error:
        raise damaged(file, "it is not UTF-8", remedy) from error
    except OSError as error:
        raise LowRankKitError(f"'{file}' cannot be read: {error.strerror}") from error
