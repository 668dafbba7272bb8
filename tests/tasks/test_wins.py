"""Answers that a function of the user's compares with those of the model before: `evaluation.win`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError, DataError
from qlora.evaluation.wins import count_wins
from qlora.run import Run

JUDGES = """
def shorter(prompt, answer, before):
    assert isinstance(prompt, str)
    return "tie" if answer == before else "win" if len(answer) < len(before) else "lose"


def unsure(prompt, answer, before):
    return 0.5
"""
WIN = ["evaluation.win=lab_judges:shorter", "trusted=[lab_judges]"]
QUICK = [
    *("recipe=none", "lora.r=4", "device=cpu", "trainer.per_device_train_batch_size=2", "trainer.max_steps=2"),
    *("trainer.eval_steps=1", "data.max_eval_samples=4", "data.max_train_samples=8", "generation.max_new_tokens=4"),
    *("trainer.learning_rate=0.05", "evaluation=loss", "trainer.save_steps=1", "trainer.warmup_steps=0"),
]


@pytest.fixture(autouse=True)
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "lab_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path / "modules")


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    chosen = [*QUICK, *overrides]
    return Run(compose(chosen), folder, overrides=chosen).execute()


def test_wins_are_counted_against_the_start_and_may_be_the_objective_and_what_is_kept(tmp_path: Path) -> None:
    objective = ["objective=eval_win_rate", "trainer.keep=best", "trainer.keep_metric=eval_win_rate"]
    result = run(tmp_path / "run", *WIN, *objective)
    metrics = result["metrics"]
    previous, after = (
        [json.loads(line)["prediction"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("base_predictions.jsonl", "predictions.jsonl")
    )
    assert len(previous) == len(after) == 4
    wins = sum(len(new) < len(old) for new, old in zip(after, previous, strict=True))
    ties = sum(new == old for new, old in zip(after, previous, strict=True))
    assert [metrics[f"eval_{name}"] for name in ("win_count", "tie_count", "loss_count")] == [
        wins,
        ties,
        4 - wins - ties,
    ]
    assert metrics["eval_win_rate"] == result["objective"] == (wins + ties / 2) / 4
    low, high = result["intervals"]["eval_win_rate"]
    assert low <= metrics["eval_win_rate"] <= high
    assert "base_eval_win_rate" not in metrics
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_win_rate" in entry] == [1, 2]

    # Resumed, where the start is measured already, and measured by another task.
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").unlink()
    again = run(tmp_path / "run", *WIN, *objective)["metrics"]
    measured = run(tmp_path / "evaluate", *WIN, "task=evaluate", f"adapter={tmp_path / 'run'}")["metrics"]
    assert again["eval_win_rate"] == measured["eval_win_rate"] == metrics["eval_win_rate"]


def test_a_verdict_that_is_none_is_refused_with_its_row() -> None:
    records = [{"input": "2 + 2", "prediction": "4"}, {"input": "3 + 3", "prediction": "6"}]
    measured = count_wins(lambda prompt, new, old: "tie" if new == old else "win", records, records[::-1])
    assert measured.metrics == {"win_rate": 1.0, "win_count": 2.0, "tie_count": 0.0, "loss_count": 0.0}
    with pytest.raises(DataError, match=r"evaluation\.win must return win, tie or lose, got 0\.5 for held-out row 1$"):
        count_wins(lambda *_: 0.5, records, records)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.win=shorter"], r"evaluation\.win must be module:function, a function of yours that compares a"),
        ([*WIN, "evaluation.baseline=false"], r"evaluation\.win=lab_judges:shorter compares with answers of the model"),
        (["evaluation.win=lab_judges:shorter"], r"evaluation\.win=lab_judges:shorter: .*trusted=\[lab_judges\]"),
        (["objective=eval_win_rate"], r"objective='eval_win_rate' is not a metric of this run"),
        ([*WIN, "objective=base_eval_win_rate"], r"objective='base_eval_win_rate' is not a metric of this run"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_a_judge_that_is_not_there_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    missing = ["evaluation.win=lab_judges:longer", "trusted=[lab_judges]"]
    with pytest.raises(ConfigError, match=r"evaluation\.win=lab_judges:longer: module lab_judges has no function long"):
        Run(compose([*QUICK, *missing]), tmp_path / "run").session.measurer  # noqa: B018
