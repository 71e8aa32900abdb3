"""Files of rows and of running text: what is wrong in one is said with its line and what to do about it."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from lowrank_kit.errors import LowRankKitError

Row = dict[str, Any]

# Of the encodings that files come in by mistake, by their first bytes.
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Dataset's own readers take no larger ones.
_INTEGERS = range(-(2**63), 2**63)


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without byte order mark.

    Raises `LowRankKitError` with file and line for one in another encoding.
    """
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, guess = raw.count(b"\n", 0, error.start) + 1, _BYTE_ORDER_MARKS.get(raw[:2])
        found = f"byte 0x{raw[error.start]:02x}" if guess is None else f"it begins as {guess} does"
        raise LowRankKitError(
            f"{file}, line {line}: the file is not UTF-8 ({found}): write it again as UTF-8, for example "
            f"iconv -f {guess or 'LATIN1'} -t UTF-8"
        ) from error


def read_jsonl(file: Path) -> list[Row]:
    """Read one JSON object a line.

    Raises `LowRankKitError` with file and line for one that is none, or that holds what no text or number can be.
    """
    # Not by splitlines: JSON strings may hold what only Unicode takes for the end of a line.
    lines = read_text(file).split("\n")
    return [_row(line, f"{file}, line {number}") for number, line in enumerate(lines[: _end(lines)], start=1)]


def table(rows: list[Row], file: Path, first_line: int | None = 1) -> datasets.Dataset:
    """Rows as a data set; ``first_line`` is that of the first one, None where their order is not the file's.

    Raises `LowRankKitError` with file, line and column where a column's values are of several kinds.
    """
    try:
        return datasets.Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        for column in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(column) for row in rows]
            if (bad := _first_that_fails(values)) is not None:
                where = f"{file}, row {bad}" if first_line is None else f"{file}, line {first_line + bad}"
                before = next((value for value in values[:bad] if value is not None), None)
                raise LowRankKitError(
                    f"{where}: column '{column}' holds {_shown(values[bad])}, and before it {_shown(before)}: give "
                    "every line the same kind of value in a column"
                ) from error
        raise LowRankKitError(f"{file}: its rows make no table: {error}") from error


def _end(lines: list[str]) -> int:
    """The number of lines without the empty one that the last line's end leaves."""
    return len(lines) - (not lines[-1])


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LowRankKitError(
            f"{where}: not a JSON object: {error}; write one object a line, such as {_EXAMPLE}"
        ) from error
    if not isinstance(row, dict):
        raise LowRankKitError(f"{where}: {_shown(row)} is no JSON object: write one object a line, such as {_EXAMPLE}")
    for column, value in row.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise LowRankKitError(
                    f"{where}: column '{column}' holds half a surrogate pair (\\ud800 to \\udfff), which is no text: "
                    "write the character itself"
                ) from error
        elif isinstance(value, int) and value not in _INTEGERS:
            raise LowRankKitError(f"{where}: column '{column}' holds {_shown(value)}, more than 64 bits hold")
    return row


_EXAMPLE = '{"text": "..."}'


def _first_that_fails(values: list[Any]) -> int | None:
    """The first value that cannot stand in one column with those before it."""
    if _stands(values):
        return None
    # A longer beginning fails where a shorter one does.
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _stands(values[:middle]) else (low, middle)
    return low


def _stands(values: list[Any]) -> bool:
    try:
        datasets.Dataset.from_dict({"values": values})
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
