"""A full disk at every phase of a run: nothing that was saved is lost, and the run resumes when there is space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.runtime.atomic_files import write_file, write_folder, write_text
from qlora.runtime.disk_space import DiskFull, Patience, waiting_for_space
from qlora.sweep.jobs import recorded
from qlora.tasks import train
from qlora.tasks.train import Training
from qlora.training.checkpoints import find_checkpoints
from tests.faults.runs import QUICK, Writes, at_step, check_whole, outcome, run


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mounts a disk in memory; skips the test where this is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no disk of its own can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=24m") as folder:
        yield folder


def fill(disk: Path, leave: int = 0) -> None:
    """Fills a disk but for `leave` bytes."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    if leave:
        os.truncate(disk / "filler", max((disk / "filler").stat().st_size - leave, 0))


def clear(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run ends with."""
    folder = tmp_path_factory.mktemp("calm")
    run(folder)
    return outcome(folder)


INSIDE = 150_000
"""Bytes that the weights of a checkpoint take and its optimizer does not find."""


def nothing() -> None:
    pass


def before_the_start(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(disk)


def at_a_checkpoint(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 4, lambda: fill(disk))


def inside_a_checkpoint(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.training.checkpoint_writer.folder_size", lambda folder: 0)
    at_step(monkeypatch, 4, lambda: fill(disk, leave=INSIDE))


def at_the_adapter(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 99, lambda: fill(disk))


def at_the_report(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Training._write_result

    def full(self: Training, *args: Any, **options: Any) -> Any:
        fill(disk)
        return write(self, *args, **options)

    monkeypatch.setattr(Training, "_write_result", full)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "phase",
    [before_the_start, at_a_checkpoint, inside_a_checkpoint, at_the_adapter, at_the_report],
    ids=lambda phase: phase.__name__,
)
def test_a_full_disk_ends_a_run_with_one_message_and_it_resumes_later(
    disk: Path, monkeypatch: pytest.MonkeyPatch, calm: dict[str, Any], phase: Callable[..., None]
) -> None:
    folder = disk / "run"
    with monkeypatch.context() as patches:
        phase(disk, patches)
        with (
            pytest.raises(DiskFull, match=r"the disk of .* is full \(.* free.*\), and no space became free in 0:00 "),
            recorded(folder, [], "result.json") if phase is not before_the_start else contextlib.nullcontext(),
        ):
            run(folder)
    check_whole(folder)
    if phase in (at_a_checkpoint, inside_a_checkpoint):
        assert [path.name for path in find_checkpoints(folder / "checkpoints")] == ["checkpoint-2"]
    assert not (folder / "checkpoints" / "unfinished").exists()
    assert not (folder / "result.json").exists()
    clear(disk)
    run(folder)
    assert outcome(folder) == calm


def test_a_run_waits_for_space_and_continues(
    disk: Path, monkeypatch: pytest.MonkeyPatch, calm: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_for_a_while() -> None:
        fill(disk)
        threading.Timer(1.5, clear, [disk]).start()

    at_step(monkeypatch, 4, fill_for_a_while)
    monkeypatch.setattr("qlora.runtime.disk_space.POLL_SECONDS", 0.1)
    run(disk / "run", "trainer.disk_wait=60")
    assert outcome(disk / "run") == calm
    output = capsys.readouterr().out
    assert re.search(rf"the disk of {disk}/run/checkpoints is full \([\d.]+ (bytes|KB) free, ", output)
    assert "B needed): the run waits up to 1:00 for space (trainer.disk_wait)" in output
    assert output.count("the run waits up to") == output.count("there is space again: resuming") == 1


@pytest.mark.full
def test_the_oldest_checkpoint_that_would_go_anyway_makes_room(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = train.save_trained
    monkeypatch.setattr(train, "save_trained", lambda session, model: (clear(disk), save(session, model)))
    at_step(monkeypatch, 6, lambda: fill(disk, leave=100_000))
    run(disk / "run", "trainer.save_total_limit=2", "trainer.disk_wait=0", "trainer.max_steps=6")
    assert [path.name for path in find_checkpoints(disk / "run" / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "Read-only file system"), ("size=4k", "No space left on device")]
)
def test_the_command_line_says_so_in_one_line(tmp_path: Path, options: str, reason: str) -> None:
    with mounted(tmp_path / "disk", options) as disk:
        if options != "ro":
            fill(disk)
        command = [sys.executable, "-m", "qlora", *QUICK, f"hydra.run.dir={disk}/run"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


class Full(Exception):
    """Ends a wait in a test."""


def test_a_disk_without_inodes_waits_and_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=24m,nr_inodes=4") as disk:

        def give_up() -> None:
            raise Full

        patience = Patience(seconds=60, make_room=lambda: False, check=give_up)
        for name in "abc":
            (disk / name).touch()
        for path in (disk / "text.json", disk / "new" / "text.json"):
            with waiting_for_space(patience), pytest.raises(Full):
                write_text(path, "{}")
        with waiting_for_space(patience), pytest.raises(Full):
            write_folder(disk / "adapter", lambda folder: (folder / "x").touch())
        said = capsys.readouterr().out
        assert said.count(f"the disk of {disk} has no inodes left for new files (") == 2
        (disk / "a").unlink()
        with waiting_for_space(patience):
            write_text(disk / "text.json", "{}")
        assert (disk / "text.json").read_text() == "{}"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError(f"I/O error: {os.strerror(errno.EDQUOT)} (os error {errno.EDQUOT})"),
        RuntimeError(f"open file failed because of errno 122 on fopen: {os.strerror(errno.EDQUOT)}"),
        RuntimeError(f"open file failed with strerror: {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_quota_and_a_library_s_own_words_count_as_a_full_disk(tmp_path: Path, error: Exception) -> None:
    times = iter([error])

    def write(temporary_file: Path) -> None:
        if (first := next(times, None)) is not None:
            raise first
        temporary_file.touch()

    seen = list[bool]()
    with waiting_for_space(Patience(seconds=60, make_room=lambda: bool(seen.append(True)) or True, check=nothing)):
        write_file(tmp_path / "file", write)
    assert seen == [True]
    assert (tmp_path / "file").exists()


@pytest.mark.full
def test_a_disk_that_becomes_full_at_any_write_loses_nothing(tmp_path: Path, calm: dict[str, Any]) -> None:
    writes, counts = Writes(), {"ended": 0, "finished": 0}
    writes.watch(tmp_path / "counted", -1, nothing)
    run(tmp_path / "counted")
    total = writes.count
    for number in range(1, total + 1, 3):
        with mounted(tmp_path / f"disk-{number}", "size=24m") as disk:
            writes.watch(disk / "run", number, lambda disk=disk: fill(disk))
            try:
                run(disk / "run")
                counts["finished"] += 1
            except DiskFull:
                counts["ended"] += 1
            writes.watch(tmp_path / "nowhere", -1, nothing)
            check_whole(disk / "run")
            clear(disk)
            run(disk / "run")
            assert outcome(disk / "run") == calm
    print(f"\nfull disk: {total} writes a run, filled before {sum(counts.values())} of them; {counts}; 0 losses")
    assert counts["ended"] > counts["finished"]
