"""An installed package of somebody else adds a tracker, a metric and a callback, and a short training run uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.config.registries import installed
from qlora.config.registries.installed import installed_names
from qlora.config.schema import TrackingConfig
from qlora.errors import ConfigError
from qlora.training.trackers import NoTracker, TrackedRun, build_tracker

CODE = '''
import json
from pathlib import Path

from transformers import TrainerCallback

from qlora.training.trackers import Tracker


class JsonLines(Tracker):
    """Appends each set of metrics to a file."""

    def log(self, metrics, step):
        with Path(self.config.uri or self.run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\\n")

    def finish(self, status, summary):
        self.log({"status": status}, -1)


def word_overlap(predictions, references):
    """Returns the fraction of each reference's words that its prediction contains."""
    pairs = [(set(a.split()), set(b.split())) for a, b in zip(predictions, references)]
    return [len(a & b) / max(len(b), 1) for a, b in pairs]


class StepLog(TrainerCallback):
    def __init__(self, path):
        self.path = Path(path)

    def on_step_end(self, args, state, control, **kwargs):
        with self.path.open("a") as file:
            file.write(f"{state.global_step}\\n")
'''
ENTRY_POINTS = """
[qlora.trackers]
json-lines = lab_tools:JsonLines
[qlora.metrics]
word_overlap = lab_tools:word_overlap
[qlora.callbacks]
step-log = lab_tools:StepLog
"""
SHORT = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1"),
    *("trainer.eval_steps=2", "data.max_eval_samples=2", "data.max_train_samples=8", "evaluation.baseline=false"),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as pip makes it: a module, and beside it the metadata with its entry points."""
    folder = tmp_path / "site"
    info = folder / "lab_tools-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "lab_tools.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-tools\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def train(folder: Path, package: Path, *overrides: str) -> Path:
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    run = folder / "run"
    command = [sys.executable, "-m", "qlora", *SHORT, *overrides, f"hydra.run.dir={run}"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_a_run_uses_the_tracker_metric_and_callback_of_an_installed_package(tmp_path: Path, package: Path) -> None:
    run = train(
        tmp_path,
        package,
        *("tracking.backend=json-lines", "evaluation.metrics=[word_overlap]"),
        *("+callbacks.log._target_=step-log", f"+callbacks.log.path={tmp_path / 'steps.txt'}"),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert lines[-1]["status"] == "finished"
    assert 0 <= json.loads((run / "metrics.json").read_text())["eval_word_overlap"] <= 1
    assert (tmp_path / "steps.txt").read_text() == "1\n2\n"


def test_a_tracker_by_its_path_needs_trust(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"code of the package 'lab_tools' would run.*trusted=\[lab_tools\]"):
        compose(["tracking.backend=lab_tools:JsonLines"])
    monkeypatch.syspath_prepend(package)
    config = compose(["tracking.backend=lab_tools:JsonLines", "trusted=[lab_tools]"])
    tracker = build_tracker(config.tracking, TrackedRun("mine", tmp_path, {}))
    tracker.log({"train/loss": 2.0}, step=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.0}


def test_an_unknown_tracker_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"tracking.backend=wandbb is unknown \(did you mean wandb\?\); choose one"):
        TrackingConfig(backend="wandbb")


def test_a_class_that_is_no_tracker_is_refused(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package)
    with pytest.raises(ConfigError, match=r"lab_tools:StepLog is not a subclass of qlora\.training\.trackers\.Tracker"):
        build_tracker(TrackingConfig(backend="lab_tools:StepLog"), TrackedRun("mine", tmp_path, {}))
    assert isinstance(build_tracker(TrackingConfig(backend="none"), TrackedRun("mine", tmp_path, {})), NoTracker)


def test_a_package_in_the_working_folder_adds_no_names(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed._read.cache_clear()
    monkeypatch.syspath_prepend(package)
    assert installed_names("qlora.trackers")["json-lines"] == "lab_tools:JsonLines"
    monkeypatch.chdir(package)
    assert "json-lines" not in installed_names("qlora.trackers")
