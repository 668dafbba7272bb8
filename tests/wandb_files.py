"""Reads the runs that wandb wrote offline, with wandb's own types."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any


def wandb_records(folder: Path, ends: int = 1) -> list[Any]:
    """Reads the records of a run's starts in their order, once `ends` of them have ended.

    wandb's own process may still be writing the last of them.
    """
    deadline = time.monotonic() + 60
    while True:
        records = read_records(folder)
        ended = sum(record.WhichOneof("record_type") == "exit" for record in records)
        if ended >= ends or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def read_records(folder: Path) -> list[Any]:
    """Reads LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    files = folder.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        raw, offset, buffer = path.read_bytes(), 7, b""
        while offset + 7 <= len(raw):
            if (rest := 32768 - offset % 32768) < 7:
                offset += rest
                continue
            size, kind = struct.unpack("<HB", raw[offset + 4 : offset + 7])
            buffer += raw[offset + 7 : offset + 7 + size]
            offset += 7 + size
            if kind in (1, 4) and offset <= len(raw):  # whole, or the last piece
                records.append(Record.FromString(buffer))
                buffer = b""
    return records


def wandb_start(folder: Path) -> Any:
    """Returns what the run was when it first began."""
    return next(record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run")


def wandb_config(run: Any) -> dict[str, Any]:
    """Returns the config of a run by its keys."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in run.config.update}


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """Returns what was logged, a dictionary a row."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_summary(records: list[Any]) -> dict[str, Any]:
    """Returns the last value of everything."""
    summary: dict[str, Any] = {}
    for record in records:
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return summary
