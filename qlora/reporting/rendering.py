"""Self-contained pages: style, script, data and the plotting library are in one file."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora.config.registries.objectives import RowKind, rows_of
from qlora.reporting.history import NOISY, Curve, curve_title
from qlora.runtime.run_folder import flatten
from qlora.text import format_duration, format_metric

FOLDER = Path(__file__).parent / "page"
SMOOTH_FROM = 40
"""The number of points from which a curve is smoothed at first."""
SMOOTHING = 0.6
MAX_NUMBER = 9
"""The most characters of a number that is shown unrounded."""
NAMES = {
    "train_runtime": "training time",
    "train_tokens_per_second": "tokens/s",
    "train_mfu": "MFU",
    "train_data_wait": "data wait",
    "train_loss": "training loss",
    "peak_memory_gb": "peak memory (GB)",
}


def render(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """Returns the page of a template in `page/`: texts of users are escaped, and nothing is loaded from elsewhere.

    `page.js` draws `data`, which holds JSON's types; the plotting library is included if there are charts.
    """
    from qlora import __version__

    has_charts = any(data[kind] for kind in ("curves", "fronts", "scatters", "importance", "parallel"))
    text = (
        _environment()
        .get_template(template)
        .render(
            data=_json(data),
            style=(FOLDER / "page.css").read_text(encoding="utf-8"),
            script="".join((FOLDER / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js")),
            plotly=packed_plotly() if has_charts else "",
            version=__version__,
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            curves=data["curves"],
            groups=data["groups"],
            smoothing=data["smoothing"],
            **context,
        )
    )
    return text.encode("utf-8", "replace").decode()  # a model may answer with half of a surrogate pair


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "breakable": breakable, "duration": format_duration, "metric": format_value, "title": metric_title
    }  # fmt: skip
    return environment


def breakable(text: str) -> Markup:
    """Returns a path or a key that may break behind its slashes, dots and underscores, before a letter."""
    return Markup("<wbr>").join(re.split(r"(?<=[/._])(?=[^\W\d_])", text))


@functools.cache
def packed_plotly() -> str:
    """Returns the plotting library compressed: 2 MB instead of 5, because each run has a page."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


def _json(data: Mapping[str, Any]) -> str:
    """Returns JSON that cannot end the script element around it."""
    return json.dumps(_short(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _short(value: Any) -> Any:
    """Rounds numbers to the six digits that a chart can show."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


def metric_title(name: str) -> str:
    """Returns the name of a metric as the page shows it."""
    if name.startswith("base_eval_"):
        return f"{metric_title(name.removeprefix('base_eval_'))} of the untuned base"
    return NAMES.get(name) or name.removeprefix("eval_").replace("_", " ")


def previous_model(loss: str, start: str | None) -> str:
    """Returns what the model is called that a run measures before it trains with a loss, maybe from a start adapter."""
    return "start" if start is not None and rows_of(loss) is not RowKind.tokens else "untuned base"


def format_value(value: float | None, name: str) -> str:
    """Returns the value of a metric as the page shows it: times as `3:07:00`, fractions in percent."""
    if value is not None and name.endswith(("_runtime", "seconds")):
        return format_duration(value)
    return format_metric(name, value)


def group(label: str, *, hue: int | None = None, rank: float = 0.0, visible: bool = True, best: bool = False) -> Any:
    """Returns an entry of the legend, with one of the eight hues or a colour between best (0) and worst (1)."""
    return {"label": label, "hue": hue, "rank": rank, "shown": visible, "best": best}


def line(index: int, curve: Curve, *, dash: str = "solid", smooth: bool = True) -> dict[str, Any]:
    """Returns a line of a chart; `index` is that of its entry in the legend."""
    return {
        "group": index,
        "step": curve.steps,
        "tokens": curve.tokens,
        "value": curve.values,
        "dash": dash,
        "smooth": smooth,
    }


def chart(name: str, lines: Sequence[dict[str, Any]], title: str | None = None) -> dict[str, Any]:
    """Returns a chart of the curves of one metric."""
    named, unit = curve_title(name)
    return {
        "title": title or named,
        "unit": unit,
        "lines": list(lines),
        "noisy": name in NOISY,
        "logarithmic": all(value > 0 for curve in lines for value in curve["value"]),
        "fromZero": name == "learning_rate",
        "format": ".1~%" if format_metric(name, 0.5).endswith("%") else "~g",
    }


def first_smoothing(charts: Sequence[dict[str, Any]]) -> float:
    """Returns the first position of the slider: curves with many points are smoothed."""
    noisy = [len(curve["value"]) for item in charts if item["noisy"] for curve in item["lines"]]
    return SMOOTHING if max(noisy, default=0) >= SMOOTH_FROM else 0.0


def plain_config(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the full keys of a config with their values as one would type them."""
    for key, value in flatten(dict(config)):
        yield key, plain_value(value)


def plain_value(value: Any) -> str:
    """Returns a config's value as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(plain_value, value))}]"
    return "{}" if value == {} else str(value)


def short_value(text: str) -> str:
    """Returns a config's value in short: a number that a search sampled is rounded to four digits."""
    try:
        return f"{float(text):.4g}" if len(text) > MAX_NUMBER else text
    except ValueError:
        return text
