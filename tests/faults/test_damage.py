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

from qlora.errors import ConfigError
from qlora.training.checkpoints import MARKER, find_checkpoints
from tests.faults.runs import at_step, outcome, run, write_rows


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


DAMAGES: list[Callable[[Path], None]] = [truncate, flip, Path.unlink]


def survive(cut: Path, folder: Path, calm: dict[str, Any], name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(cut, folder)
    damage(folder / "checkpoints" / "checkpoint-6" / name)
    run(folder)
    assert outcome(folder) == calm
    assert (folder / "checkpoints" / "checkpoint-6.torn").is_dir()


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
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "run", "data=local", f"data.path={rows}", "data.eval_dataset_size=4")
    assert f"{rows}" in str(error.value)
    assert "8" in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()
