"""What may be wrong with the world around a run: damaged checkpoints, clocks that go back, rows that are no text."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.errors import DamagedFile, UserError
from qlora.run import Run
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import Status, read_job, recorded
from qlora.training.checkpoints import MARKER, find_checkpoints
from tests.faults.damaging import restore
from tests.faults.runs import QUICK, at_step, outcome, run, write_rows


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run ends with."""
    folder = tmp_path_factory.mktemp("calm")
    run(folder)
    return outcome(folder)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off in its seventh step, with checkpoints after every second."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patches:
        at_step(patches, 7, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


EMPTY, CUT, ODD = b"", b'{"status": "fin', b"[[]]"
DAMAGES: list[Callable[[Path], None]] = [truncate, flip, Path.unlink]


def survive(cut: Path, folder: Path, calm: dict[str, Any], name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(cut, folder)
    damage(folder / "checkpoints" / "checkpoint-6" / name)
    run(folder)
    assert outcome(folder) == calm
    assert (folder / "checkpoints" / "checkpoint-6.torn").is_dir()


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "damage"),
    [("optimizer.pt", truncate), ("adapter_model.safetensors", flip), ("rng_state.pth", Path.unlink)],
    ids=["optimizer cut off", "bit of a weight flipped", "random state missing"],
)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    cut: Path,
    tmp_path: Path,
    calm: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    survive(cut, tmp_path / "run", calm, name, damage)
    assert f"checkpoint-6 is not used: {name} " in caplog.text
    assert "resuming from checkpoint-4" in capsys.readouterr().out


@pytest.mark.full
def test_no_damage_of_any_file_goes_unnoticed(cut: Path, tmp_path: Path, calm: dict[str, Any]) -> None:
    names = sorted(path.name for path in (cut / "checkpoints" / "checkpoint-6").iterdir())
    assert MARKER in names
    for name in names:
        for number, damage in enumerate(DAMAGES):
            survive(cut, tmp_path / f"{name}-{number}", calm, name, damage)
    print(f"\n{len(names) * len(DAMAGES)} damages of {len(names)} files: 0 unnoticed")


@pytest.mark.full
def test_a_clock_that_is_set_back_changes_nothing(
    cut: Path, tmp_path: Path, calm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    for path in find_checkpoints(folder / "checkpoints"):
        os.utime(path, (2e9, 2e9))  # they seem to be of the future
    now, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now() - 86_400 - 10 * (time.monotonic() - began))
    run(folder)
    assert outcome(folder) == calm
    saved = [path.name for path in find_checkpoints(folder / "checkpoints")]
    assert saved == [f"checkpoint-{step}" for step in (4, 6, 8)]
    assert json.loads((folder / "result.json").read_text())["metrics"]["train_runtime"] > 0


def test_a_row_that_is_no_text_is_named_before_any_training(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    lines = rows.read_text().splitlines()
    lines[7] = '{"instruction": "What is it?", "output": "half \\ud83d a sign"}'
    rows.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "data=local", f"data.path={rows}", "data.eval_dataset_size=4")
    assert f"{rows}" in str(error.value)
    assert "8" in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


# Damaged files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize("content", [EMPTY, CUT, ODD, b"task: 5"])
def test_a_run_whose_config_is_damaged_is_refused_and_nothing_is_overwritten(
    finished: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    restore(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    initial = tree(tmp_path / "run")
    with pytest.raises(
        DamagedFile, match=rf"/run/{name} is damaged \(.+\); put a whole copy in its place, or remove it"
    ):
        run(tmp_path / "run")
    assert tree(tmp_path / "run") == initial


@pytest.mark.full
def test_a_run_whose_result_is_damaged_ends_again_from_its_last_checkpoint(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    restore(finished, tmp_path / "run")
    for name in ("result.json", "progress.json", "history.json", "metrics.json", "baseline.json"):
        (tmp_path / "run" / name).write_bytes(CUT)
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished)
    assert "resuming from checkpoint-8" in capsys.readouterr().out
    assert f"{tmp_path}/run/result.json is damaged (" in caplog.text
    assert (tmp_path / "run" / "result.json.damaged-1").read_bytes() == CUT


@pytest.mark.full
def test_a_sweep_s_job_does_without_its_stored_config(finished: Path, tmp_path: Path) -> None:
    restore(finished, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(CUT)
    (tmp_path / "run" / "result.json").unlink()
    Run(compose(QUICK), tmp_path / "run", overrides=QUICK, sweep=SweepJob("s", [])).execute()
    assert outcome(tmp_path / "run") == outcome(finished)
    assert (tmp_path / "run" / "config.yaml.damaged-1").read_bytes() == CUT


def test_a_folder_that_is_removed_while_the_training_runs_is_written_whole_at_its_end(
    tmp_path: Path, calm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    at_step(monkeypatch, 5, lambda: shutil.rmtree(folder))
    with recorded(folder, ["lora.r=4"], "result.json"):
        run(folder)
    assert outcome(folder) == calm
    assert f"{folder} was removed while the run was at work; it is written again" in caplog.text
    for name in ("config.yaml", "manifest.json", "metrics.json", "history.json", "report.html", "README.md"):
        assert (folder / name).is_file(), name
    job = read_job(folder)
    assert (job.status, job.overrides, job.damaged) == (Status.finished, ["lora.r=4"], [])
    assert job.metrics["eval_loss"] == calm["metrics"]["eval_loss"]


@pytest.mark.full
def test_a_folder_that_is_removed_while_it_is_written_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def remove() -> None:
        shutil.rmtree(folder)
        raise FileNotFoundError(2, "No such file or directory", str(folder / "checkpoints"))

    at_step(monkeypatch, 3, remove)
    with pytest.raises(UserError, match=rf"the run folder {folder} was removed while the run wrote into it \(No such"):
        run(folder)
