"""The picture of a run's loss, for few and many points."""

from pathlib import Path
from typing import Any

import pytest

from qlora.reporting import loss_curve
from qlora.reporting.history import series
from qlora.reporting.loss_curve import plot_loss, smooth

FEW = [{"step": 1, "loss": 2.0, "learning_rate": 1e-4}, {"step": 1, "eval_loss": 1.9}]
MANY = [{"step": step, "loss": 1 + 1 / step, "learning_rate": 1e-4} for step in range(1, 5001)]
FLAT = [{"step": step, "loss": 0.0, "learning_rate": 0.0} for step in range(1, 4)]


@pytest.mark.parametrize("history", [FEW, MANY, FLAT, FEW[1:], [{"step": 9, "train_loss": 1.0}], []])
def test_any_history_gives_a_png(history: list[dict[str, float]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "loss.png"
    plot_loss(history, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_the_global_figure_state_of_pyplot_stays_untouched(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    plot_loss(FEW, tmp_path / "loss.png")
    assert plt.get_fignums() == []


def test_a_repeated_step_counts_once_and_values_without_number_are_left_out() -> None:
    history = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    history += [{"step": 3, "loss": float("nan")}, {"step": 4, "eval_loss": 1.0}]
    assert series(history, "loss") == ([1, 2], [4.0, 3.0])


def test_a_loss_over_answers_is_drawn_with_that_of_held_out_rows_and_not_with_the_loss_of_their_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plotted: list[Any] = []
    monkeypatch.setattr(loss_curve, "_draw_losses", lambda axes, *curves: plotted.append((axes.get_ylabel(), *curves)))
    tokens = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.6}]
    loss_curve.plot_loss(tokens, tmp_path / "tokens.png")
    answers = [*tokens, {"step": 2, "eval_loss": 0.6, "eval_preference_loss": 0.3}]
    loss_curve.plot_loss(answers, tmp_path / "answers.png")
    assert [(label, curve[1]) for label, _, curve in plotted] == [("loss (nats per token)", [0.6]), ("loss", [0.3])]


def test_smoothing_keeps_a_constant_and_averages_its_neighbourhood() -> None:
    assert smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([10.0, 1.0, 0.2], "log"), ([10.0, 1.0, 0.21], "linear"), ([10.0, 0.1, 0.0], "linear"), ([2.0, 1.0], "linear")],
)
def test_losses_over_a_fifty_fold_range_get_a_logarithmic_axis(
    losses: list[float], scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(loss_curve, "save_figure", lambda figure, path: figures.append(figure))
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    plot_loss([*history, {"step": 9, "eval_loss": losses[-1]}], tmp_path / "loss.png")
    axes = figures[0].axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low < min(losses)
    assert high > max(losses)
