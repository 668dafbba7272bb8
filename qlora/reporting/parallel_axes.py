"""Draws what jobs of a sweep were given and what came of it: a line a job, through an axis a column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora.runtime.atomic_files import write_file

INK, GRID = "#1f2933", "#9fb3c8"
TICKS = 5
DECADES = 50.0
"""Positive numbers whose largest is so many times the smallest lie on a logarithmic axis."""


@dataclass(frozen=True)
class Axis:
    """Places of values between 0 and 1, and the values that are written beside the axis."""

    places: list[float]
    ticks: list[tuple[float, str]]


def plot_parallel(columns: Mapping[str, Sequence[Any]], path: Path, *, maximizes: bool) -> None:
    """Writes a PNG of columns of numbers or words, one value a job; the last gives the colours.

    The best line by the last column is drawn above the others; `maximizes` says which end is the better one.
    """
    axes_of = [build_axis(values) for values in columns.values()]
    figure = Figure(figsize=(max(4.0, 1.8 * len(columns)), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_axes(axes, list(columns), axes_of)
    quality = [place if maximizes else 1 - place for place in axes_of[-1].places]
    shades = colormaps["viridis_r"]
    for job in sorted(range(len(quality)), key=lambda job: quality[job]):
        best = quality[job] == max(quality)
        line = [axis.places[job] for axis in axes_of]
        axes.plot(
            line, color=shades(0.15 + 0.85 * quality[job]), linewidth=2.4 if best else 1.2, alpha=1.0 if best else 0.7
        )
    write_file(path, lambda draft: figure.savefig(draft, format="png", facecolor="white"))


def build_axis(values: Sequence[Any]) -> Axis:
    """Returns the axis of a column: numbers by size, on a logarithmic scale where they span decades, words in order."""
    numbers = [float(value) for value in values if _is_number(value)]
    if len(numbers) < len(values):
        words = list(dict.fromkeys(str(value) for value in values))
        steps = {word: (place + 0.5) / len(words) for place, word in enumerate(words)}
        return Axis([steps[str(value)] for value in values], [(place, word) for word, place in steps.items()])
    low, high = min(numbers), max(numbers)
    scale = math.log if low > 0 and high / low >= DECADES else float
    span = scale(high) - scale(low)
    places = [(scale(number) - scale(low)) / span if span else 0.5 for number in numbers]
    known = sorted(set(zip(places, numbers, strict=True)))
    if len(known) > TICKS:
        known = [known[round(place * (len(known) - 1) / (TICKS - 1))] for place in range(TICKS)]
    return Axis(places, [(place, f"{number:.4g}") for place, number in known])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_axes(axes: Axes, names: Sequence[str], axes_of: Sequence[Axis]) -> None:
    for place, axis in enumerate(axes_of):
        axes.axvline(place, color=GRID, linewidth=1)
        for height, text in axis.ticks:
            axes.annotate(text, (place, height), (4, 0), textcoords="offset points", fontsize=7, color=INK, va="center")
    axes.set_xticks(range(len(names)), names, fontsize=8, color=INK, rotation=15 if len(names) > 4 else 0)
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)
    axes.margins(x=0.06)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
