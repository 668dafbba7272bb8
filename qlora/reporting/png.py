"""Pictures as PNG by matplotlib; the pages draw by plotly, which writes a PNG only by way of a browser."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora.runtime.atomic_files import write_file

INK, FAINT, GRID = "#1f2933", "#9fb3c8", "#e4e9ef"


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, without matplotlib's global state."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG on white, whole or not at all."""
    write_file(path, lambda temporary_file: figure.savefig(temporary_file, format="png", facecolor="white"))
