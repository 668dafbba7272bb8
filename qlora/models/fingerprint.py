"""What decides a model's output beside the config: its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDS = 2**20
"""Bytes at either end of a file that are read."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_digest(folder: Path) -> str:
    """Returns the SHA-256 of an adapter's settings and weights."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def content_digest(folder: Path) -> str:
    """Returns the SHA-256 of a model's files by names, sizes and the first and last MiB of each; equal for a copy."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(size - ENDS, min(size, ENDS)))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Returns the SHA-256 of names, sizes and times of change of a model's files: its weights are too many to read."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()
