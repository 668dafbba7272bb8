"""Signals: a run that is asked to end saves a checkpoint first, says how to resume, and exits with its own code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import Stopped
from qlora.evaluation.measure import Measurer
from qlora.session import Session
from qlora.training.checkpoints import find_checkpoints
from tests.faults.runs import QUICK, at_step, run, send

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
ONLY = ["trainer.save_steps=null", "trainer.eval_steps=null", "task.evaluate=false"]
"""No checkpoint but the one that a signal asks for."""


def saved(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoints(folder / "checkpoints")]


def several(*acts: Callable[[], object]) -> Callable[[], None]:
    def act() -> None:
        for act in acts:
            act()

    return act


@pytest.mark.full
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_the_step_and_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    at_step(monkeypatch, 3, send(number))
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, *ONLY, "resume=force")
    command = shlex.join(["qlora", *QUICK, *ONLY, f"hydra.run.dir={tmp_path}"])
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    assert str(stopped.value) == f"stopped by {number.name}: step 3 is saved in {checkpoint}; resume with\n  {command}"
    said = "stopping after this step and saving; press Ctrl-C {}to stop at once without saving"
    whole = said.format("again ") if number is signal.SIGINT else f"{number.name}: {said.format('')}"
    assert f"\n{whole}\n" in capfd.readouterr().err
    assert saved(tmp_path) == ["checkpoint-3"]
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("acts", "ends"),
    [
        ([signal.SIGINT, signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGTERM, signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGUSR1, signal.SIGTERM], Stopped),  # as SLURM sends them
        ([signal.SIGTERM, signal.SIGTERM], Stopped),
    ],
)
def test_a_second_ctrl_c_ends_at_once_and_other_signals_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acts: list[signal.Signals], ends: type[BaseException]
) -> None:
    at_step(monkeypatch, 3, several(*map(send, acts)))
    with pytest.raises(ends):
        run(tmp_path, *ONLY)
    assert saved(tmp_path) == (["checkpoint-3"] if ends is Stopped else [])


def test_before_the_first_step_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "load_base", lambda self: send(signal.SIGTERM)())
    with pytest.raises(Stopped, match=r"stopped by SIGTERM: there is no checkpoint yet; resume with\n  qlora "):
        run(tmp_path, *ONLY)


def test_an_evaluation_is_finished_and_its_step_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measurer.measure

    def interrupted(self: Measurer, *args: Any, **options: Any) -> Any:
        send(signal.SIGTERM)()
        return measure(self, *args, **options)

    monkeypatch.setattr(Measurer, "measure", interrupted)
    with pytest.raises(Stopped):
        run(tmp_path, "trainer.eval_steps=3", "trainer.save_steps=null")
    assert saved(tmp_path) == ["checkpoint-3"]
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3]


@pytest.mark.full
def test_workers_leave_ctrl_c_of_a_terminal_to_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c() -> None:
        children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        for child in {int(word) for path in children for word in path.read_text().split()}:
            if "wandb" not in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, ctrl_c)
    with pytest.raises(Stopped):
        run(tmp_path, *ONLY, "trainer.dataloader_num_workers=2", "trainer.group_by_length=false")
    assert saved(tmp_path) == ["checkpoint-3"]


@pytest.mark.full
def test_a_handler_of_somebody_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        at_step(monkeypatch, 3, send(signal.SIGTERM))
        run(tmp_path, *ONLY, "trainer.max_steps=4")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM]


def test_the_command_line_exits_with_75_and_names_the_command_to_resume(tmp_path: Path) -> None:
    overrides, folder = [*QUICK, *ONLY, "trainer.max_steps=5000", "trainer.logging_steps=1"], tmp_path / "its run"
    overrides = [*overrides, f"hydra.run.dir='{folder}'"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", *overrides],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 120
    while not (folder / "progress.json").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Stopped.exit_code == 75
    [checkpoint] = saved(folder)
    step = checkpoint.partition("-")[2]
    said, command = errors.strip().splitlines()[-2:]
    assert said == f"stopped by SIGUSR1: step {int(step):,} is saved in its run/checkpoints/{checkpoint}; resume with"
    assert shlex.split(command) == [sys.executable, "-m", "qlora", *overrides]
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert "Traceback" not in errors
