"""SIGKILL at random moments, inside saves too: nothing half-written is taken for whole, and no bit changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.killing import Killer, start
from tests.faults.runs import Writes, kinds, outcome, run


def torment(tmp_path: Path, names: list[str], total: int, most: int) -> Killer:
    all_overrides = {name: overrides for name, overrides in kinds(tmp_path).items() if name in names}
    writes, calm, number, began = Writes(), {}, 0, time.monotonic()
    for name, overrides in all_overrides.items():
        writes.watch(tmp_path / f"calm-{name}", -1, lambda: None)
        run(tmp_path / f"calm-{name}", *overrides)
        calm[name] = outcome(tmp_path / f"calm-{name}")
    killer = Killer(total, seconds=(time.monotonic() - began) / len(names), writes=writes.count)
    while killer.kills < total:
        name = names[number % len(names)]
        killer.torment(tmp_path / f"run-{number}", all_overrides[name], most)
        assert outcome(tmp_path / f"run-{number}") == calm[name]
        number += 1
    print(
        f"\n{killer.kills} kills of {number} runs ({', '.join(names)}): {killer.in_writes} left something "
        f"half-written, {killer.resumed} starts resumed from a checkpoint; 0 losses"
    )
    return killer


@pytest.mark.full
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    assert torment(tmp_path, ["grouped"], total=3, most=3).kills == 3


@pytest.mark.full
def test_fifty_kills_change_no_bit(tmp_path: Path) -> None:
    killer = torment(tmp_path, ["plain", "packed", "mixed", "grouped", "workers", "streamed"], total=50, most=5)
    assert killer.in_writes >= 10
    assert killer.resumed >= 20


@pytest.mark.full
def test_a_second_run_in_the_folder_is_refused_and_the_first_is_not_disturbed(tmp_path: Path) -> None:
    overrides = ["trainer.max_steps=150", "trainer.save_steps=null", "trainer.eval_steps=null"]
    first = start(tmp_path / "run", overrides)
    while not (tmp_path / "run" / "progress.json").exists():
        assert first.is_alive()
        time.sleep(0.05)
    second = start(tmp_path / "run", overrides)
    second.join()
    assert first.is_alive()
    first.join()
    assert (second.exitcode, first.exitcode) == (1, 0)
    output = (tmp_path / "run" / "output.txt").read_text()
    assert f"RunError: {tmp_path}/run is in use by another process; wait until it has ended, or choose" in output
    assert outcome(tmp_path / "run")["history"][-1]["step"] == 150
