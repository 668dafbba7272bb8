"""Private parts of wandb: its login without a prompt, and the files of an offline run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 2**15
"""Bytes of a chunk's header and of a block of the file."""
WHOLE, FIRST, LAST = 1, 2, 4
"""The kinds of chunks: a whole record, the first part of one, the last."""


def credentials(wandb: Any) -> Any:
    """Returns the credentials that wandb finds on this machine, or something false; asks nobody and no server.

    wandb's public `login` asks on the terminal where it finds none. Raises `wandb.errors.Error` for unusable ones.
    """
    wandb.setup(wandb.Settings(silent=True))
    if hasattr(wandb.sdk.lib, "wbauth"):
        from wandb.sdk.lib import wbauth

        host = wandb.setup().settings.base_url
        return wbauth.authenticate_session(host=host, source="qlora", prompt=False, update_session=False)
    return wandb.api.api_key


def count_rows(file: Path) -> int:
    """Returns how many rows of metrics the file of an offline run holds; its end may be missing.

    The file is a LevelDB log: after 7 bytes come blocks of 32 KiB, which hold records in chunks, each with a header of
    7 bytes. wandb has no public reader of it.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made by protobuf at run time

    raw, offset, record, rows = file.read_bytes(), HEADER, b"", 0
    while offset + HEADER <= len(raw):
        if (left := BLOCK - offset % BLOCK) < HEADER:
            offset += left
            continue
        size, kind = struct.unpack("<HB", raw[offset + 4 : offset + HEADER])
        offset += HEADER + size
        if offset > len(raw):
            break
        record = (b"" if kind in (WHOLE, FIRST) else record) + raw[offset - size : offset]
        if kind in (WHOLE, LAST):
            rows += Record.FromString(record).HasField("history")
    return rows
