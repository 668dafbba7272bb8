"""Draws the varied values and results of a sweep's jobs: one line for each job, one axis for each column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from qlora.reporting.png import FAINT, INK, new_figure, save_figure

TICKS = 5
DECADES = 50.0
"""Positive numbers get a logarithmic axis if their maximum is this many times the minimum."""


@dataclass(frozen=True)
class Axis:
    """The positions of values between 0 and 1, and the labels of the axis."""

    positions: list[float]
    ticks: list[tuple[float, str]]


def plot_parallel(columns: Mapping[str, Sequence[Any]], path: Path, *, maximizes: bool) -> None:
    """Writes a PNG of columns of numbers or texts, one value for each job; the last column sets the colours.

    The best line by the last column is drawn above the others; `maximizes` says which end is the better one.
    """
    axes_of = [build_axis(values) for values in columns.values()]
    figure = new_figure(max(4.0, 1.8 * len(columns)), 4.5)
    axes = figure.subplots()
    _draw_axes(axes, list(columns), axes_of)
    quality = [position if maximizes else 1 - position for position in axes_of[-1].positions]
    shades = colormaps["viridis_r"]
    for job in sorted(range(len(quality)), key=lambda job: quality[job]):
        best = quality[job] == max(quality)
        line = [axis.positions[job] for axis in axes_of]
        axes.plot(
            line, color=shades(0.15 + 0.85 * quality[job]), linewidth=2.4 if best else 1.2, alpha=1.0 if best else 0.7
        )
    save_figure(figure, path)


def build_axis(values: Sequence[Any]) -> Axis:
    """Returns the axis of a column: numbers by size, on a logarithmic scale if they span decades; texts in order."""
    numbers = [float(value) for value in values if _is_number(value)]
    if len(numbers) < len(values):
        texts = list(dict.fromkeys(str(value) for value in values))
        steps = {text: (index + 0.5) / len(texts) for index, text in enumerate(texts)}
        return Axis([steps[str(value)] for value in values], [(position, text) for text, position in steps.items()])
    low, high = min(numbers), max(numbers)
    scale = math.log if low > 0 and high / low >= DECADES else float
    span = scale(high) - scale(low)
    positions = [(scale(number) - scale(low)) / span if span else 0.5 for number in numbers]
    known = sorted(set(zip(positions, numbers, strict=True)))
    if len(known) > TICKS:
        known = [known[round(tick * (len(known) - 1) / (TICKS - 1))] for tick in range(TICKS)]
    return Axis(positions, [(position, f"{number:.4g}") for position, number in known])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_axes(axes: Axes, names: Sequence[str], axes_of: Sequence[Axis]) -> None:
    for index, axis in enumerate(axes_of):
        axes.axvline(index, color=FAINT, linewidth=1)
        for height, text in axis.ticks:
            axes.annotate(text, (index, height), (4, 0), textcoords="offset points", fontsize=7, color=INK, va="center")
    axes.set_xticks(range(len(names)), names, fontsize=8, color=INK, rotation=15 if len(names) > 4 else 0)
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)
    axes.margins(x=0.06)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
