"""What a training run keeps from the garbage collector, it gives back."""

from __future__ import annotations

import gc

import pytest

from qlora.training.garbage import WARM, Unsearched


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the collector in their order."""
    made: list[str] = []
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: made.append(name))
    return made


def test_a_warm_run_is_not_searched_until_it_ends(calls: list[str]) -> None:
    callback = Unsearched()
    for _ in range(WARM - 1):
        callback.on_step_end()
    assert calls == []
    for _ in range(3):
        callback.on_step_end()
    assert calls == ["collect", "freeze"]
    callback.close()
    callback.close()
    assert calls == ["collect", "freeze", "unfreeze"]


def test_a_run_that_never_was_warm_has_nothing_to_give_back(calls: list[str]) -> None:
    callback = Unsearched()
    callback.on_step_end()
    callback.close()
    assert calls == []
