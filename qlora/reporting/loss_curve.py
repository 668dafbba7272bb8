"""Draws a run's loss and learning rate from the trainer's log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qlora.reporting.history import Series, held_out_loss, series
from qlora.reporting.png import FAINT, GRID, INK, new_figure, save_figure

TRAIN, HELD_OUT, RATE = "#2f6fb0", "#d1495b", "#5b7c65"
SMOOTH_FROM = 40
"""The number of points from which the curve is smoothed."""
LOG_FROM = 50
"""The ratio of the highest loss to the lowest from which the axis is logarithmic."""


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG of training loss, held-out loss and learning rate over the steps.

    `history` is the trainer's `state.log_history`. Entries without a number are left out. An empty history gives a
    picture that says so.
    """
    measured = held_out_loss({name for entry in history for name in entry})
    training, held_out = series(history, "loss"), series(history, measured)
    rate = series(history, "learning_rate")
    figure = new_figure(8, 5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _dress(top, "loss (nats per token)" if measured == "eval_loss" else "loss")
    _draw_losses(top, training, held_out)
    _draw_rate(bottom, rate)
    save_figure(figure, path)


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Returns the centred mean of `span` values; near an end, of the values that exist."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, result = span // 2, []
    for index in range(len(values)):
        first, last = max(index - half, 0), min(index + half + 1, len(values))
        result.append((sums[last] - sums[first]) / (last - first))
    return result


def _draw_losses(axes: Axes, training: Series, held_out: Series) -> None:
    steps, values = training
    many = len(values) >= SMOOTH_FROM
    if values:
        marker = "o" if len(values) == 1 else None
        raw: dict[str, Any] = (
            {"color": TRAIN, "alpha": 0.25, "linewidth": 0.8} if many else {"color": TRAIN, "linewidth": 1.6}
        )
        axes.plot(steps, values, marker=marker, label=None if many else "training", **raw)
    if many:
        span = max(5, len(values) // 25)
        axes.plot(steps, smooth(values, span), color=TRAIN, linewidth=1.8, label="training (smoothed)")
    if held_out[1]:
        style: dict[str, Any] = {
            "color": HELD_OUT,
            "linewidth": 1.6,
            "marker": "o",
            "markersize": 5,
            "markeredgecolor": "white",
        }
        axes.plot(*held_out, **style, label="held out", zorder=3)
        _label_last(axes, held_out)
    if not values and not held_out[1]:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center", color=FAINT)
        return
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    _limit(axes, values, held_out[1], many)


def _limit(axes: Axes, training: list[float], held_out: list[float], many: bool) -> None:
    """Fits the axis to the curves; a few spikes of many raw points may lie outside.

    Losses over a wide range, none of them 0, get a logarithmic axis, on which the small ones are told apart.
    """
    ordered = sorted(training)
    top = max(ordered[int(0.995 * (len(ordered) - 1))] if many else max(ordered, default=0), max(held_out, default=0))
    low = min(min(ordered, default=math.inf), min(held_out, default=math.inf))
    if low > 0 and top / low >= LOG_FROM:
        room = (top / low) ** 0.06
        axes.set_yscale("log")
        axes.set_ylim(low / room, top * room**2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / low < 1e4 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    room = 0.06 * (top - low) or 0.1 * abs(top) or 1.0
    axes.set_ylim(low - room, top + 2 * room)


def _label_last(axes: Axes, points: Series) -> None:
    last = (points[0][-1], points[1][-1])
    style: dict[str, Any] = {"color": HELD_OUT, "fontsize": 9, "ha": "right", "va": "bottom", "fontweight": "bold"}
    axes.annotate(f"{last[1]:.3g}", last, xytext=(0, 6), textcoords="offset points", **style)


def _draw_rate(axes: Axes, rate: Series) -> None:
    _dress(axes, "learning rate")
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate_label(value)))
    if rate[1]:
        axes.plot(*rate, color=RATE, linewidth=1.5, marker="o" if len(rate[1]) == 1 else None)
        axes.set_ylim(0, 1.15 * max(rate[1]) or 1.0)
        axes.set_yticks([0.0, max(rate[1])])  # the peak, exactly


def _rate_label(value: float) -> str:
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)
