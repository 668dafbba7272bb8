"""The table of a sweep: what stands in it, how it fits a terminal, and the front of a search by several goals."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from synthetic_runs import write_sweep

from qlora.runtime import console
from qlora.sweep.leaderboard import (
    Leaderboard,
    build_leaderboard,
    fit,
    fit_columns,
    print_leaderboard,
    short_names,
    to_csv,
    to_markdown,
)
from qlora.sweep.sweep_folder import Sweep, read_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A grid over two long keys and two seeds: the whole table is about 110 characters wide."""
    axes = {
        "lora.r": ["4", "8"],
        "trainer.learning_rate": ["1e-4", "0.00012345678901234567"],
        "lora.target_modules": ["all-linear", "[q_proj,k_proj,v_proj,o_proj]"],
        "seed": ["0", "1"],
    }
    return read_sweep(write_sweep(tmp_path / "ranks", axes))


def as_lists(lines: list[str]) -> list[list[str]]:
    """Cells of lines, which have at least two blanks between them."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


@pytest.mark.parametrize(
    ("room", "head", "left_out"),
    [
        (40, ["r", "loss", "time"],
         ["trainer.learning_rate", "lora.target_modules", "seeds", "eval_exact_match", "peak_memory_gb"]),
        (80, ["r", "lr", "targets", "seeds", "loss", "time", "GB"], ["eval_exact_match"]),
        (120, ["r", "learning_rate", "target_modules", "seeds", "loss", "exact_match", "time", "GB"], []),
    ],
)  # fmt: skip
def test_the_table_fits_a_terminal_in_whole_cells(
    sweep: Sweep, room: int, head: list[str], left_out: list[str]
) -> None:
    lines, missing = fit(build_leaderboard(sweep), room)
    assert max(map(len, lines)) <= room
    assert len(lines) == 9
    cells = as_lists(lines)
    assert (cells[0], missing) == (head, left_out)
    assert {len(row) for row in cells[1:]} == {len(head) + 1}
    assert cells[1][:2] == ["1", "8"]
    assert ("0.0001235" in cells[1]) == (room > 40)
    assert any(re.fullmatch(r"\d\.\d{3} ± 0\.\d{3}", cell) for cell in cells[1])


@pytest.mark.parametrize("room", [80, 120])
def test_a_terminal_shows_one_line_a_row_and_says_what_is_left_out(
    sweep: Sweep, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(room))
    monkeypatch.setattr("sys.stdout", terminal)
    console._console_on.cache_clear()
    print_leaderboard(build_leaderboard(sweep))
    printed = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert max(map(len, printed.splitlines())) <= room
    assert ("left out" in printed) == (room == 80)
    if room == 80:
        assert "eval_exact_match: the terminal is too narrow; see leaderboard.md" in printed


def test_what_is_no_terminal_gets_all_columns(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    console._console_on.cache_clear()
    print_leaderboard(build_leaderboard(sweep))
    head = capsys.readouterr().out.splitlines()[1]
    assert as_lists([head]) == [["r", "learning_rate", "target_modules", "seeds", "loss", "exact_match", "time", "GB"]]


def test_names_are_short_where_that_is_clear() -> None:
    assert short_names(["lora.r", "trainer.learning_rate", "seed"]) == {
        "lora.r": "r", "trainer.learning_rate": "learning_rate", "seed": "seed"
    }  # fmt: skip
    assert short_names(["model.name", "data.name"]) == {"model.name": "model.name", "data.name": "data.name"}


# Several goals


@pytest.fixture
def front(tmp_path: Path) -> Leaderboard:
    """Of four runs, the third is worse than the first in both goals, and the fourth has diverged."""
    sweep = read_sweep(write_sweep(tmp_path / "front", {"lora.r": ["4", "8", "16", "32"]}))
    sweep.goals = {"eval_loss": "minimize", "eval_exact_match": "maximize"}
    actual = {"4": (0.5, 0.6), "8": (0.4, 0.5), "16": (0.6, 0.5), "32": (float("nan"), 0.1)}
    for job in sweep.jobs.values():
        job.metrics["eval_loss"], job.metrics["eval_exact_match"] = actual[job.values["lora.r"]]
    return build_leaderboard(sweep)


def test_the_front_of_several_goals_is_marked_everywhere(front: Leaderboard) -> None:
    assert {row.values["lora.r"]: row.in_front for row in front.rows} == {
        "8": True,
        "4": True,
        "16": False,
        "32": False,
    }
    assert [row.values["lora.r"] for row in front.rows] == ["8", "4", "16", "32"]
    lines, _ = fit(front, 80)
    assert [line.split()[:2] for line in lines[1:]] == [["1", "*"], ["2", "*"], ["3", "16"], ["4", "32"]]
    text = to_markdown(front, "front")
    assert "| 2 \\* | 4 |" in text
    assert (
        "\\* in front: no other job is better by eval_loss or eval_exact_match without being worse by another" in text
    )
    rows = list(csv.DictReader(io.StringIO(to_csv(front))))
    assert [(row["lora.r"], row["front"]) for row in rows] == [("8", "yes"), ("4", "yes"), ("16", "no"), ("32", "no")]


def test_a_single_goal_has_no_front(sweep: Sweep) -> None:
    sweep.goals = {"eval_loss": "minimize"}
    board = build_leaderboard(sweep)
    assert not any(row.in_front for row in board.rows)
    assert "*" not in to_markdown(board, "ranks")
    assert "front" not in to_csv(board).splitlines()[0]


def test_runs_that_are_equal_in_all_goals_are_both_in_front(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "equal", {"lora.r": ["4", "8"]}))
    sweep.goals = {"eval_loss": "minimize", "train_runtime": "minimize"}
    for job in sweep.jobs.values():
        job.metrics |= {"eval_loss": 0.5, "train_runtime": 3.0}
    assert all(row.in_front for row in build_leaderboard(sweep).rows)


def test_cells_of_a_narrow_table_can_be_recognised() -> None:
    columns = {
        "run": ["2026-11-30_07-47-17", "mine"],
        "model.name": ["tiny", "/models/TinyStories-656K"],
        "gradient_checkpointing": ["true", "false"],
        "data.path": ["rows/chats-one.jsonl", "rows/chats-two.jsonl"],
        "eval_loss": ["0.008", "7.943"],
    }
    lines, left_out = fit_columns(columns, {}, 60, numeric=["eval_loss"], spare=[])
    assert not left_out
    assert [re.split(r" {2,}", line) for line in lines] == [
        ["run", "model", "gradien…", "data.pa…", "eval_loss"],
        ["2026-11-30_07-47-17", "tiny", "true", "chats-o…", "0.008"],
        ["mine", "TinySto…", "false", "chats-t…", "7.943"],
    ]
