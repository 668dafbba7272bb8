"""Which checkpoint a killed run is resumed from, and which are removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.training import checkpoints
from qlora.training.checkpoints import (
    MARKER,
    damage_reason,
    finalize,
    find_checkpoints,
    last_checkpoint,
    read_metadata,
    remove_surplus,
)


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"moments" * 100)
    (checkpoint / "shards" / "0.bin").write_bytes(b"part")
    finalize(checkpoint, {"step": step})
    return checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "marker missing": (lambda folder: (folder / MARKER).unlink(), "complete.json is missing: it was not written"),
    "marker empty": (lambda folder: (folder / MARKER).write_text(""), "complete.json is damaged"),
    "marker cut": (lambda folder: os.truncate(folder / MARKER, 40), "complete.json is damaged"),
    "marker of a list": (lambda folder: (folder / MARKER).write_text("[]"), "complete.json is damaged"),
    "marker flipped": (lambda folder: flip(folder / MARKER), "complete.json is damaged"),
    "file missing": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "file cut": (lambda folder: os.truncate(folder / "optimizer.pt", 60), "optimizer.pt has 60 bytes of 700"),
    "bit flipped": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt has other bytes than were written"),
    "file in a folder": (lambda folder: flip(folder / "shards" / "0.bin"), "shards/0.bin has other bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole, broken = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 10)
    act, reason = DAMAGES[damage]
    act(broken)
    left = sorted(path.name for path in broken.rglob("*"))
    assert last_checkpoint(tmp_path) == whole
    aside = tmp_path / "checkpoint-10.torn"
    assert sorted(path.name for path in aside.rglob("*")) == left
    assert f"{broken} is not used: {reason}" in caplog.text
    assert "it is kept as checkpoint-10.torn" in caplog.text
    assert find_checkpoints(tmp_path) == [whole]
    write_checkpoint(tmp_path, 10)
    (broken / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == whole
    assert (tmp_path / "checkpoint-10.torn-2").is_dir()


def test_without_a_whole_checkpoint_a_training_begins_anew(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-2").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_what_is_stored_with_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 3)
    assert last_checkpoint(tmp_path) == checkpoint
    metadata = read_metadata(checkpoint)
    assert metadata["step"] == 3
    assert metadata["files"].keys() == {"optimizer.pt", "shards/0.bin"}


@pytest.mark.parametrize("chunk", [100, 128])
def test_each_chunk_of_a_large_file_has_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", chunk)
    checkpoint, content = write_checkpoint(tmp_path, 3), b"moments" * 100
    chunks = [content[start : start + chunk] for start in range(0, 700, chunk)]
    size, digests = read_metadata(checkpoint)["files"]["optimizer.pt"]
    assert size == 700
    assert digests == [hashlib.sha256(part).hexdigest() for part in chunks]
    for offset in (0, chunk - 1, chunk, 699):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(damaged)
        assert damage_reason(checkpoint) == "optimizer.pt has other bytes than were written"
    (checkpoint / "optimizer.pt").write_bytes(content)
    assert damage_reason(checkpoint) is None


def test_a_crash_while_a_checkpoint_was_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 3)
    checkpoint.rename(tmp_path / "checkpoint-3.old")
    assert last_checkpoint(tmp_path) == checkpoint


def test_the_oldest_checkpoints_go_by_their_steps_and_the_newest_stays(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write_checkpoint(tmp_path, step)
    os.utime(tmp_path / "checkpoint-10", (0, 0))  # written after the clock was set back
    assert not remove_surplus(tmp_path, None)
    assert not remove_surplus(tmp_path, 3)
    assert remove_surplus(tmp_path, 1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    assert remove_surplus(tmp_path, 0)
    assert not remove_surplus(tmp_path, 0)
    assert json.loads((tmp_path / "checkpoint-10" / MARKER).read_text())["step"] == 10


def test_files_are_flushed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, seen = threading.Event(), []

    def flush(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        seen.append(name)
        if name == "a.bin":
            flushed.set()

    monkeypatch.setattr(os, "fsync", flush)
    folder = tmp_path / "unfinished"
    with checkpoints.flushing(folder):
        folder.mkdir()
        (folder / "a.bin").write_bytes(b"a")
        assert flushed.wait(20)
    count = len(seen)
    time.sleep(5 * checkpoints.FLUSH_SECONDS)
    assert len(seen) == count


def test_what_the_disk_says_meanwhile_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def flush(folder: Path) -> None:
        asked.set()
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(checkpoints, "flush_folder", flush)
    with pytest.raises(OSError, match="broken"), checkpoints.flushing(tmp_path):
        assert asked.wait(20)
    with pytest.raises(ValueError, match="first"), checkpoints.flushing(tmp_path):
        raise ValueError("first")
