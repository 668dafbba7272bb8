"""A run may go to several trackers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError, ResourceError
from qlora.training import trackers
from qlora.training.trackers import TrackedRun, Tracker, build_tracker


class Recorder(Tracker):
    """Notes what it is handed, with the name of its tracker."""

    calls: list[tuple[Any, ...]]

    def __init__(self, config: Any, run: TrackedRun) -> None:
        super().__init__(config, run)
        if config.backend == "mlflow":
            raise ResourceError("no login")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((self.config.backend, metrics, step))

    def finish(self, status: str, summary: dict[str, float]) -> None:
        self.calls.append((self.config.backend, status))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    Recorder.calls = []
    monkeypatch.setattr(trackers, "tracker_class", lambda config: Recorder)
    return Recorder.calls


def build(folder: Path, *overrides: str) -> Tracker:
    return build_tracker(compose(overrides).tracking, TrackedRun("run", folder, {}))


def test_each_of_several_trackers_gets_what_a_run_logs(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    tracker = build(tmp_path, "tracking=wandb", "tracking.also=[tensorboard]")
    tracker.log({"loss": 1.0}, 3)
    tracker.finish("finished", {})
    names = ("wandb", "tensorboard")
    assert calls == [*((name, {"loss": 1.0}, 3) for name in names), *((name, "finished") for name in names)]


def test_a_tracker_that_cannot_start_leaves_none_open(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ResourceError, match="no login"):
        build(tmp_path, "tracking=wandb", "tracking.also=[mlflow]")
    assert calls == [("wandb", "failed")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking.also=[wandb]"], r"tracking.also=\['wandb'\] beside tracking=none: name each tracker once"),
        (["tracking=wandb", "tracking.also=[wandb]"], r"name each tracker once, one with tracking= and the others in"),
        (["tracking=wandb", "tracking.also=[tensorbord]"], r"tracking.also\[0\]=tensorbord is unknown \(did you mean"),
        (["tracking=wandb", "tracking.also=['mine:Class']"], r"tracking.also\[0\]=mine:Class: code of the package"),
    ],
)
def test_trackers_that_are_named_twice_or_unknown_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)
