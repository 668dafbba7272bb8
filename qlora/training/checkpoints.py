"""Checkpoints on the disk: whether they are complete, from which one a run is resumed, and which are removed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora.errors import DamagedFile
from qlora.runtime.atomic_files import flush_folder, read_json, restore_folder, write_text

log = logging.getLogger(__name__)

MARKER = "complete.json"
"""The last file of a checkpoint: the metadata of the run, and all other files with their sizes and hashes."""
UNFINISHED = "unfinished"
"""Where a checkpoint is written before it gets its name."""
TORN, DIVERGED = "torn", "diverged"
"""Why a checkpoint is set aside: it is not as it was written, or a rollback leaves it behind."""
CHUNK_BYTES = 2**26
"""Bytes of a file that have a hash of their own, so that several are computed at a time."""
FLUSH_SECONDS = 0.02
"""Between two flushes of what is being written."""
NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the oldest first, by their steps: clocks may be set back."""
    return sorted((path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def finalize(checkpoint: Path, metadata: dict[str, Any]) -> None:
    """Flushes a checkpoint to the disk and marks it as complete; `metadata`, in JSON's types, is stored with it."""
    with ThreadPoolExecutor() as pool:
        flushed = pool.submit(flush_folder, checkpoint)
        record = {**metadata, "files": _files(checkpoint, pool)}
        flushed.result()
    write_text(checkpoint / MARKER, json.dumps({"digest": _digest(record), **record}, indent=2) + "\n")


@contextlib.contextmanager
def flushing(folder: Path) -> Iterator[None]:
    """Flushes what the block writes to a folder while it is written, so that `finalize` has little left to flush.

    Raises the errors of the disk: the system reports each of them only once.
    """
    written = threading.Event()

    def flush() -> None:
        while not written.wait(FLUSH_SECONDS):
            with contextlib.suppress(FileNotFoundError):  # not there yet, or a temporary file that has been renamed
                flush_folder(folder)

    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush)
        try:
            yield
        finally:
            written.set()
        flushed.result()


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns the metadata that `finalize` stored with a checkpoint."""
    metadata = read_json(checkpoint / MARKER)
    assert isinstance(metadata, dict)
    return metadata


def damage_reason(checkpoint: Path) -> str | None:
    """Reads a whole checkpoint and returns why it cannot be used; None: it is as it was written."""
    try:
        record = read_json(checkpoint / MARKER)
    except DamagedFile:
        return f"{MARKER} is damaged"
    if record is None:
        return f"{MARKER} is missing: it was not written to its end"
    if not isinstance(record, dict) or record.pop("digest", None) != _digest(record):
        return f"{MARKER} is damaged"
    with ThreadPoolExecutor() as pool:
        for name, (size, digests) in record["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
            if list(_hashes(path, pool)) != digests:
                return f"{name} has other bytes than were written"
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint in a folder that is as it was written; None: there is none.

    A newer one that is not is set aside under another name, with a warning that says what is wrong.
    """
    for old in folder.glob("checkpoint-*.old"):
        restore_folder(old.with_suffix(""))
    for checkpoint in reversed(find_checkpoints(folder)):
        reason = damage_reason(checkpoint)
        if reason is None:
            return checkpoint
        log.warning("%s is not used: %s; it is kept as %s", checkpoint, reason, set_aside(checkpoint, TORN).name)
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Renames a checkpoint to `checkpoint-150.WHY`, which is never resumed; returns the new path."""
    path, count = checkpoint.with_name(f"{checkpoint.name}.{why}"), 1
    while path.exists():
        count += 1
        path = checkpoint.with_name(f"{checkpoint.name}.{why}-{count}")
    return checkpoint.rename(path)


Needed = Callable[[Sequence[Path]], set[Path]]
"""Returns the checkpoints that a run may need that ends, or resumes, at one of those that are retained."""


def needs_none(retained: Sequence[Path]) -> set[Path]:
    """Returns nothing: a run that keeps its last step needs no checkpoint but the newest."""
    return set()


def remove_surplus(folder: Path, limit: int | None, needed: Needed = needs_none) -> bool:
    """Removes the oldest checkpoint that is neither one of the `limit` newest nor `needed`; returns whether it did.

    The newest is never removed.
    """
    checkpoints = find_checkpoints(folder)
    if limit is None or len(checkpoints) <= max(limit, 1):
        return False
    retained = checkpoints[-max(limit, 1) :]
    kept = {*retained, *needed(retained)}
    surplus = next((checkpoint for checkpoint in checkpoints if checkpoint not in kept), None)
    if surplus is not None:
        shutil.rmtree(surplus)
    return surplus is not None


def _files(checkpoint: Path, pool: ThreadPoolExecutor) -> dict[str, tuple[int, list[str]]]:
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    hashes = [(path, _hashes(path, pool)) for path in paths]  # of all files at once
    return {path.relative_to(checkpoint).as_posix(): (path.stat().st_size, list(digests)) for path, digests in hashes}


def _hashes(path: Path, pool: ThreadPoolExecutor) -> Iterator[str]:
    """Starts to hash the chunks of a file."""
    return pool.map(lambda start: _hash(path, start), range(0, path.stat().st_size, CHUNK_BYTES))


def _hash(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), CHUNK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
