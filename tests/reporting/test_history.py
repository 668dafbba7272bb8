"""Curves from what the trainer logged, also of runs that did not end well."""

from __future__ import annotations

import json
import math
from pathlib import Path

from qlora.reporting.history import Curve, curve_title, curves, read_history

HISTORY = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-4, "grad_norm": 1.0, "num_input_tokens_seen": 10},
    {"step": 2, "loss": "nan", "learning_rate": 1e-4, "num_input_tokens_seen": 20},
    {"step": 2, "eval_loss": 2.5, "eval_perplexity": 12.0, "eval_mmlu_val_accuracy": 0.3, "num_input_tokens_seen": 20},
    {"step": 2, "eval_mmlu_val_accuracy_history": 0.2, "eval_runtime": 3.0},
    {"step": 3, "loss": 2.0, "num_input_tokens_seen": 30},
    {"step": 3, "train_loss": 2.5, "train_runtime": 9.0, "total_flos": 1.0},
]


def test_curves_hold_what_was_measured_and_leave_out_bookkeeping_details_and_what_is_no_number() -> None:
    actual = curves(HISTORY)
    assert list(actual) == ["loss", "eval_loss", "eval_mmlu_val_accuracy", "grad_norm", "learning_rate"]
    assert actual["loss"] == Curve([1, 3], [3.0, 2.0], [10, None])
    assert actual["eval_loss"].values == [2.5]


def test_a_thinned_curve_has_at_most_n_of_the_points_and_ends_where_the_training_run_ended() -> None:
    curve = Curve([float(step) for step in range(1, 1001)], [1 / step for step in range(1, 1001)], [None] * 1000)
    thin = curve.thin(300)
    assert 200 < len(thin.steps) <= 300
    assert thin.steps[-1] == 1000
    assert set(zip(thin.steps, thin.values, strict=True)) <= set(zip(curve.steps, curve.values, strict=True))
    assert curve.thin(1000) is curve
    assert Curve([], [], []).thin(5).steps == []


def test_a_killed_run_has_the_curve_of_its_newest_checkpoint(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    for step in (9, 100):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    assert read_history(tmp_path) == [{"step": 100, "loss": 1.0}]
    (tmp_path / "checkpoints" / "checkpoint-100" / "trainer_state.json").write_text("{half a fi")
    assert read_history(tmp_path) == [{"step": 9, "loss": 1.0}]
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    saved = read_history(tmp_path)
    assert saved[:1] + saved[2:] == HISTORY[:1] + HISTORY[2:]
    assert math.isnan(saved[1]["loss"])


def test_titles_are_for_people() -> None:
    assert curve_title("eval_loss") == ("held-out loss", "nats per token")
    assert curve_title("eval_mmlu_val_accuracy") == ("mmlu val accuracy", "held out")
