"""Files and folders that come whole or not at all, and what they do where the disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qlora.errors import Stopped, UserError
from qlora.runtime import disk_space
from qlora.runtime.atomic_files import (
    append_line,
    read_json,
    read_lines,
    remove_temporary_files,
    restore_folder,
    write_folder,
    write_lines,
    write_text,
)
from qlora.runtime.disk_space import DiskFull, Patience, is_disk_full, patiently, waiting_for_space


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def patience(
    seconds: float = 60, *, make_room: Callable[[], bool] = lambda: False, check: Callable[[], None] = lambda: None
) -> Patience:
    return Patience(seconds, make_room, check)


class Failing:
    """Fails several times before it writes."""

    def __init__(self, times: int) -> None:
        self.left, self.calls = times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise full()
        return "written"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "POLL_SECONDS", 0.01)


def test_a_full_disk_is_waited_for_and_the_write_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = Failing(3)
    with waiting_for_space(patience()):
        assert patiently(tmp_path / "a", write) == "written"
    assert write.calls == 4
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"the disk of {tmp_path} is full (")
    assert first.endswith("): the run waits up to 1:00 for space (trainer.disk_wait)")
    assert last == "there is space again: resuming"


def test_room_is_made_before_anybody_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rooms = iter([True, True, False])
    with waiting_for_space(patience(0, make_room=lambda: next(rooms))):
        assert patiently(tmp_path / "a", Failing(2)) == "written"
        with pytest.raises(
            DiskFull, match=r"no space became free in 0:00 \(trainer\.disk_wait\); what was saved before is"
        ):
            patiently(tmp_path / "a", Failing(1))
        with pytest.raises(OSError, match="No space left"):  # nothing is waited for a second time
            patiently(tmp_path / "a", Failing(1))
    assert capsys.readouterr().out == ""


def test_what_is_known_to_be_too_large_is_not_tried(tmp_path: Path) -> None:
    write = Failing(0)
    with waiting_for_space(patience(0)), pytest.raises(DiskFull, match=r"free, 1,000,000,000\.0 GB needed"):
        patiently(tmp_path / "not" / "yet", write, size=10**18)
    assert write.calls == 0


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped("stopped by SIGTERM")

    with waiting_for_space(patience(check=stop)), pytest.raises(Stopped):
        patiently(tmp_path / "a", Failing(1))


def test_other_failures_and_those_of_an_impatient_write_are_raised_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        patiently(tmp_path / "a", Failing(1))

    def fail() -> None:
        raise ValueError("no such thing")

    with waiting_for_space(patience()), pytest.raises(ValueError, match="no such thing"):
        patiently(tmp_path / "a", fail)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (full(), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_full_disk_is_known_by_what_each_library_says(error: Exception, expected: bool) -> None:
    assert is_disk_full(error) is expected
    wrapped = UserError("cannot be written")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is expected


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []
    flush, rename = os.fsync, Path.replace

    def note_flush(handle: int) -> None:
        seen.append(("flush", Path(f"/proc/self/fd/{handle}").readlink().name))
        flush(handle)

    def note_rename(self: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_text(tmp_path / "a.json", "{}")
    assert seen == [("flush", f".a.json.{os.getpid()}.tmp"), ("rename", "a.json"), ("flush", tmp_path.name)]


def test_lines_come_back_as_they_went(tmp_path: Path) -> None:
    records = [{"text": "äöü 日本\nline"}, {"text": "ends \u2028 of \x85 lines \x0b to \r some"}, {"number": 1.5}]
    write_lines(tmp_path / "lines.jsonl", records)
    assert read_lines(tmp_path / "lines.jsonl") == records
    assert read_lines(tmp_path / "lines.jsonl", 2) == records[:2]
    assert read_lines(tmp_path / "none.jsonl") == []
    assert read_json(tmp_path / "none.json") is None


def test_a_write_that_fails_leaves_the_old_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_lines(path, [{"old": 1}])

    def broken() -> Iterator[dict[str, Any]]:
        yield {"new": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(path, broken())
    assert read_lines(path) == [{"old": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_can_be_read_once_are_never_written_in_part(tmp_path: Path) -> None:
    def once() -> Iterator[dict[str, Any]]:
        yield {"new": 1}
        raise full()

    with waiting_for_space(patience()), pytest.raises(UserError, match=r"lines\.jsonl cannot be written"):
        write_lines(tmp_path / "lines.jsonl", once())
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_ends_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"cut')
    append_line(tmp_path / "a.jsonl", json.dumps({"whole": 1}))
    assert (tmp_path / "a.jsonl").read_text() == '{"cut\n{"whole": 1}'


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    write_folder(path, lambda folder: (folder / "a").write_text("old"))

    def broken(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(path, broken)
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_folder(path, lambda folder: (folder / "b").write_text("new"))
    assert [entry.name for entry in path.iterdir()] == ["b"]
    path.rename(tmp_path / "adapter.old")  # as a crash between the two renames leaves it
    restore_folder(path)
    assert (path / "b").read_text() == "new"


def test_what_a_kill_left_of_files_and_folders_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".result.json.123.tmp").write_text("{")
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "weights").touch()
    (tmp_path / "result.json").write_text("{}")
    remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
