"""Which checkpoint a training that was killed goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.training.trainer import last_checkpoint


@pytest.mark.parametrize("cut", [None, "", '{"global_step": 1'], ids=["no state", "empty state", "half a state"])
def test_a_checkpoint_that_a_kill_cut_off_is_removed_and_the_one_before_it_counts(
    tmp_path: Path, cut: str | None
) -> None:
    whole, broken = tmp_path / "checkpoint-8", tmp_path / "checkpoint-10"
    for folder in (whole, broken):
        folder.mkdir()
        (folder / "optimizer.pt").write_text("weights")
    (whole / "trainer_state.json").write_text('{"global_step": 8}')
    if cut is not None:
        (broken / "trainer_state.json").write_text(cut)
    assert last_checkpoint(tmp_path) == whole
    assert not broken.exists()


def test_without_a_whole_checkpoint_a_training_begins_anew(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-2").mkdir()
    assert last_checkpoint(tmp_path) is None
