"""Read back what offline W&B runs left on disk: wandb itself has no reader for its `run-*.wandb` files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
WHOLE, LAST = 1, 4


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    """Return every offline run below ``folder``, one dictionary each.

    Keys: `id`, `project`, `group`, `job_type`, `tags`, `config`, `history` (a list of rows), `summary`, `artefacts`
    (the files of each by its name), `system_metrics` (how often they were taken), and `exit_code`, which is None for
    a run that never ended. A run directory that was resumed has one for each start; one killed at once may not even
    have written its `id`, which then is None.
    """
    return [_run(file) for file in sorted(folder.glob("**/wandb/offline-run-*/run-*.wandb"))]


def _run(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "exit_code": None}
    found |= {"id": None, "project": None, "group": None, "job_type": None, "tags": []}
    found |= {"artefacts": {}, "system_metrics": 0}
    for record in _records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "project": record.run.project, "group": record.run.run_group}
            found |= {"job_type": record.run.job_type, "tags": list(record.run.tags)}
            found["config"] |= _values(record.run.config.update)
        elif kind == "history":
            found["history"].append(_values(record.history.item))
        elif kind == "summary":
            found["summary"] |= _values(record.summary.update)
        elif kind == "artifact":
            found["artefacts"][record.artifact.name] = {entry.path for entry in record.artifact.manifest.contents}
        elif kind == "stats":
            found["system_metrics"] += 1
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(file: Path) -> Iterator[Any]:
    """Protobuf records in LevelDB log blocks of 32 KiB; one that a killed process left half is left out."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, position, parts = file.read_bytes(), HEADER, b""
    while position + RECORD_HEADER <= len(data):
        if (room := BLOCK - position % BLOCK) < RECORD_HEADER:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + RECORD_HEADER
        position = start + length
        if position > len(data):
            return
        parts += data[start:position]
        if kind in (WHOLE, LAST):
            record = pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
