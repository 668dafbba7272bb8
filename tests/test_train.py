"""`qlora.train`: a run from Python, with its metrics, its page and its answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import qlora
from qlora.errors import UserError

QUICK = (
    *("lora.r=2", "trainer.max_steps=2", "trainer.warmup_steps=0", "trainer.lr_scheduler_kwargs.num_decay_steps=1"),
    *("trainer.per_device_train_batch_size=4", "data.max_eval_samples=8", "data.max_train_samples=16"),
    *("evaluation=loss", "task.predict=false", "generation.max_new_tokens=4"),
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(autouse=True)
def _there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


@pytest.fixture(scope="module")
def run(workplace: Path) -> qlora.FinishedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return qlora.train(*QUICK, "name=mine")


def test_a_run_has_its_metrics_its_adapter_and_its_page(run: qlora.FinishedRun) -> None:
    saved = json.loads((run.folder / "result.json").read_text())
    assert run.folder == Path("outputs/runs/mine")
    assert run.metrics.eval_loss == run.metrics["eval_loss"] == saved["metrics"]["eval_loss"]
    assert dict(run.metrics) == saved["metrics"]
    assert "eval_loss" in dir(run.metrics)
    assert run.page.is_file()
    assert run.adapter == run.folder / "adapter"
    assert "eval_loss=" in repr(run)


def test_a_metric_that_a_run_lacks_is_named_with_those_it_has(run: qlora.FinishedRun) -> None:
    with pytest.raises(AttributeError, match=r"no metric eval_los \(did you mean eval_loss\?\); it has .*train_loss"):
        _ = run.metrics.eval_los


def test_a_run_answers_as_its_adapter_and_as_its_base(
    run: qlora.FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [run.ask("What is the opposite of brave?"), run.ask("What is the opposite of brave?", base=True)]
    assert all(isinstance(answer, str) for answer in answers)
    assert answers[0] == run.ask("What is the opposite of brave?")
    assert answers[0] not in capsys.readouterr().out
    with pytest.raises(UserError, match="ask needs a question"):
        run.ask(" ")


def test_the_same_name_returns_the_run_as_it_was_saved(run: qlora.FinishedRun) -> None:
    again = qlora.train(*QUICK, "name=mine")
    assert dict(again.metrics) == dict(run.metrics)


def test_a_run_without_a_name_gets_a_folder_of_its_own_and_changes_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qlora.Run, "train", lambda run: {"metrics": {}})
    first = qlora.train(*QUICK)  # which prepares the environment
    previous = dict(os.environ)
    folders = {first.folder, qlora.train(*QUICK).folder}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {Path("outputs/runs")}
    assert dict(os.environ) == previous


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.rank=2"], "lora.rank"),
        (["task=evaluate", "adapter=none"], "task=evaluate: qlora.train trains; leave it out"),
        (["sweep=lora-rank"], "qlora.train starts one run, and a sweep is many"),
        (["sweep.compare={by: lora.r, baseline: 8, margin: 1}"], "compares runs of a sweep, and qlora.train"),
        (["data=local", "data.path=missing.jsonl", "trainer.lr_scheduler_type=warmup_stable_decay"], "missing.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_in_a_sentence_and_leaves_no_folder(
    overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        qlora.train(*QUICK, *overrides, "name=refused")
    assert not Path("outputs/runs/refused").exists()
