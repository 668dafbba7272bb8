"""Draws histograms of the lengths of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qlora.reporting.loss_curve import HELD_OUT, TRAIN
from qlora.reporting.png import FAINT, GRID, INK, new_figure, save_figure
from qlora.reporting.preview.content import Lengths, Preview, count_lengths, one_line

BAR = "#9dbfe0"  # TRAIN, lighter, so that lines stand out
BINS = 80
MARKS = {"median": (TRAIN, "-"), "p95": (TRAIN, "--"), "max": (FAINT, "-"), "limit": (HELD_OUT, "-")}


def plot_lengths(preview: Preview, path: Path) -> None:
    """Writes a PNG of the histograms of `preview.lengths`, with median, 95th percentile, longest row and limit.

    Without rows the picture says so. The parent folders of `path` are created.
    """
    counted = count_lengths(preview, BINS)
    figure = new_figure(8, 0.6 + 1.6 * max(len(counted), 1))
    panels = figure.subplots(max(len(counted), 1), 1, squeeze=False)[:, 0]
    for axes, lengths in zip(panels, counted, strict=False):
        _draw(axes, lengths)
    if not counted:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no rows were counted", transform=panels[0].transAxes, ha="center", color=FAINT)
    else:
        panels[-1].set_xlabel("tokens a row", color=INK)
    save_figure(figure, path)


def _draw(axes: Axes, lengths: Lengths) -> None:
    # A bar of one length is centred on it, so everything starts half a token lower.
    left = [lengths.low - 0.5 + index * lengths.step for index in range(len(lengths.counts))]
    axes.bar(left, lengths.counts, lengths.step, align="edge", color=BAR, edgecolor="white", linewidth=0.3)
    axes.set_xlim(max(left[0], -0.5), lengths.high + 0.5 + 0.01 * (lengths.high - lengths.low))
    axes.set_ylim(0, 1.08 * max(lengths.counts) or 1)
    axes.set_title(one_line(lengths.name), loc="left", color=INK, fontsize=10, fontweight="bold", parse_math=False)
    axes.set_ylabel("rows", color=INK, fontsize=9)
    for locator, axis in ((MaxNLocator(integer=True, nbins=8), axes.xaxis), (MaxNLocator(3, integer=True), axes.yaxis)):
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    values = {"median": lengths.median, "p95": lengths.p95, "max": lengths.most, "limit": lengths.limit}
    lines = [_mark(axes, lengths, name, value) for name, value in values.items() if value is not None]
    axes.legend(handles=lines, frameon=False, labelcolor=INK, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))


def _mark(axes: Axes, lengths: Lengths, name: str, value: int) -> Line2D:
    label = f"{name} {value:,}"
    if name == "limit" and lengths.over:
        label += f" ({lengths.over:,} over)"
    color, dashes = MARKS[name]
    if value > lengths.high:
        return Line2D([], [], label=f"{label} →", linestyle="none")
    style: dict[str, Any] = {"color": color, "linestyle": dashes, "linewidth": 1.5}
    x = value + (0.5 if name == "limit" else 0)  # a limit lies after the greatest length that it allows
    axes.axvline(x, zorder=4 - list(MARKS).index(name) / 10, **style)  # where marks meet, the median is on top
    return Line2D([], [], label=label, **style)
