"""What a terminal shows while a sweep runs: a line for each running job, and one for all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.runtime import console
from qlora.sweep import live_table
from qlora.sweep.jobs import Job, Status
from qlora.sweep.live_table import Screen, label, rooms
from qlora.sweep.sweep_folder import Sweep


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep of four jobs on a terminal, whose clock stands still."""
    monkeypatch.setattr(console, "is_live", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    console._console_on.cache_clear()
    monkeypatch.setattr(live_table, "write_report", lambda sweep: None)
    monkeypatch.setattr(live_table, "time", SimpleNamespace(monotonic=lambda: 100.0))
    jobs = [Job(tmp_path / f"r{rank}", [f"lora.r={rank}", "trainer.learning_rate=0.000123456789"]) for rank in range(4)]
    return Sweep(tmp_path, "eval_loss", {job.name: job for job in jobs})


def printed() -> list[tuple[str, float, float | None, str]]:
    """The lines at the foot of the terminal."""
    [display] = console._live
    return [(task.description, task.completed, task.total, task.fields["note"]) for task in display.tasks]


def step(job: Job, step: int, **fields: Any) -> None:
    job.progress = {"step": step, "max_steps": 50, "loss": 1.23456, "tokens_per_second": 1234.5, **fields}


def test_each_running_job_has_a_line_and_the_sweep_has_counts_best_and_time_left(watched: Sweep) -> None:
    first, second, third, _ = watched.jobs.values()
    with Screen(watched, 4) as screen_view:
        for job in (first, second):
            screen_view.started(job)
        step(second, 10, seconds_left=40)
        screen_view.waiting([first, second])
        assert printed() == [
            ("sweep", 0, 4, "1:20 left"),
            ("0 0.0001235", 0, None, "starting"),
            ("1 0.0001235", 10, 50, "loss 1.235  1,234 tokens/s  0:40 left"),
        ]
        first.status, first.reason = Status.failed, "ValueError: a bad row"
        screen_view.ended(first)
        second.status, second.objective, second.seconds = Status.finished, 0.5, 60
        screen_view.ended(second)
        screen_view.started(third)
        screen_view.waiting([third])
        assert printed() == [
            ("sweep", 2, 4, "1 failed  2:00 left  best 0.500"),
            ("2 0.0001235", 0, None, "starting"),
        ]
    assert not console._live


def test_values_in_brackets_are_shown_as_they_are(watched: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    job = next(iter(watched.jobs.values()))
    job.overrides = ["lora.target_modules=[bold]"]
    with Screen(watched, 1) as screen_view:
        screen_view.started(job)
        [display] = console._live
        console.screen().print(display.get_renderable())
    assert "[bold]" in capsys.readouterr().out


def test_without_any_step_no_time_is_told(watched: Sweep) -> None:
    first, *_ = watched.jobs.values()
    with Screen(watched, 4) as screen_view:
        screen_view.started(first)
        screen_view.waiting([first])
        assert printed()[0] == ("sweep", 0, 4, "")


def test_a_wide_terminal_has_room_for_names_and_for_the_best_job(
    watched: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    console._console_on.cache_clear()
    first, second, *_ = watched.jobs.values()
    first.status, first.objective = Status.finished, 0.5
    with Screen(watched, 3) as screen_view:
        screen_view.started(second)
        screen_view.waiting([second])
        assert printed() == [
            ("sweep", 0, 3, "best 0.500 r=0 learning_rate=0.0001235"),
            ("r=1 learning_rate=0.0001235", 0, None, "starting"),
        ]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_line_is_no_wider_than_the_terminal(width: int) -> None:
    for_label, for_notes = rooms(width)
    assert for_label + for_notes + live_table.BESIDE == max(width, 67)


def test_a_job_of_many_keys_is_called_by_its_values(tmp_path: Path) -> None:
    assert label(Job(tmp_path / "job"), 20) == "job"
    job = Job(tmp_path, ["lora.r=8", "trainer.learning_rate=0.000123456789"])
    assert label(job, 40) == "r=8 learning_rate=0.0001235"
    assert label(job, 20) == "8 0.0001235"
    job = Job(tmp_path, ["lora.target_modules=[q_proj,k_proj,v_proj]", "trainer.learning_rate=0.000123456789"])
    assert label(job, 23) == "[q_pr … j] 0.0001235"
    assert len(label(Job(tmp_path, [f"trainer.key_{number}=12345" for number in range(9)]), 20)) <= 20
