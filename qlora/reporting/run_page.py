"""The page of one run: its metrics before and after, curves, answers, config, and what it was made of."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qlora.reporting.answers import intact, read_answers
from qlora.reporting.examples import read_examples
from qlora.reporting.history import Curve, curves, held_out_loss, read_history, with_base
from qlora.reporting.kept import kept_lines
from qlora.reporting.rendering import (
    chart,
    first_smoothing,
    format_value,
    group,
    line,
    metric_title,
    plain_config,
    plain_value,
    previous_model,
    render,
)
from qlora.runtime.atomic_files import read_record, write_text
from qlora.runtime.run_folder import RunFolder, flatten
from qlora.runtime.saved_run import to_numbers
from qlora.text import format_bytes, format_range, is_detail, visible

SILENT_SECONDS = 600
"""A page stops loading itself again when nothing was written for this long."""
POINTS = 4_000
"""Of a curve."""
WARNED = re.compile(r"^\S+ \S+ (?:WARNING|ERROR) qlora[\w.]*: (.*)", re.MULTILINE)
DATA_COUNTS = {
    "train_rows": "rows to train",
    "eval_rows": "rows held out",
    "train_tokens": "tokens to train",
    "trained_tokens": "of them with loss",
    "mean_length": "tokens a row, mean",
    "max_length": "tokens a row, most",
    "cut_sources": "sources cut",
    "cut_targets": "targets cut",
    "dropped_rows": "rows dropped",
    "too_long_rows": "rows dropped as too long",
    "empty_rows": "rows dropped, answers empty",
    "equal_rows": "pairs dropped, both sides equal",
    "empty_answers": "empty answers in rows that are kept",
    "left_out_rows": "rows left out",
    "eval_dropped_rows": "held-out rows dropped",
    "eval_too_long_rows": "held-out rows dropped as too long",
    "eval_empty_rows": "held-out rows dropped, answers empty",
    "eval_equal_rows": "held-out pairs dropped, both sides equal",
    "eval_left_out_rows": "held-out rows left out",
    "packs": "packs",
    "format": "format",
    "template": "template",
    "fingerprint": "fingerprint of the tokens",
}
SHOWN_IF_ZERO = ("train_rows", "eval_rows")


@dataclass(frozen=True)
class RunState:
    """How far a run is that has not finished."""

    status: str
    """`running`, `interrupted`, `failed` or `pruned`."""
    note: str
    """What it does, or why it ended."""
    reload_seconds: float | None = None
    """How often the page loads itself again; None: the run has ended."""


def write_run_page(folder: RunFolder, result: Mapping[str, Any], *, command: str) -> Path:
    """Writes `report.html` of a finished run and returns its path.

    `result` holds `metrics`, `intervals`, `gains` and `paths`, as `result.json` does; `command` starts the run again.
    Raises `ResourceError` if the folder cannot be written.
    """
    write_text(folder.report, run_page(folder, result, command=command))
    return folder.report


def run_page(folder: RunFolder, result: Mapping[str, Any], *, command: str, state: RunState | None = None) -> str:
    """Returns the page as HTML, from `result` and the other files in the run's folder.

    `state` is that of a run that has not finished; `result` then holds the metrics that are known.
    """
    manifest = intact(folder.stored_manifest) or {}
    metrics, config = result.get("metrics", {}), manifest.get("config", {})
    previous = previous_model(config.get("loss", {}).get("name", "sft"), config.get("lora", {}).get("start"))
    charts, groups = _charts(with_base(curves(read_history(folder.path)), base_metrics(folder, metrics)))
    answers = read_answers(folder)
    examples = [_example(row) for row in intact(lambda: read_examples(folder.examples)) or []]
    changed = manifest.get("preset")
    model = [(label, text) for label, text in manifest.get("model", {}).items()
             if label != "folder" and isinstance(text, str)] + kept_lines(result)  # fmt: skip
    sections = {
        "metrics": "Metrics",
        "curves": "Curves" if charts else "",
        "answers": "Answers" if answers else "",
        "examples": "Training rows" if examples else "",
        "run": "Run",
        "config": "Config" if "config" in manifest else "",
        "files": "Files",
    }
    data = {"groups": groups, "curves": charts, "smoothing": first_smoothing(charts), "objective": None}
    data |= {"fronts": [], "scatters": [], "importance": [], "parallel": []}
    if state is not None and state.reload_seconds is not None:
        data["live"] = {"written": int(time.time() * 1000), "seconds": state.reload_seconds, "silent": SILENT_SECONDS}
    return render(
        "run.html.jinja",
        data,
        title=folder.path.resolve().name,
        over="Run report",
        sections=[(anchor, title) for anchor, title in sections.items() if title],
        started=str(manifest.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        state=state,
        warnings=_warnings(folder.path / "train.log"),
        tiles=_tiles(metrics, previous),
        previous=previous,
        compared=any(key.startswith("base_eval_") for key in metrics),
        certain=bool(result.get("intervals")),
        measured=_measured(result, detail=False),
        details=_measured(result, detail=True),
        command=command,
        answers=answers,
        judged=any(answer["right"] for answer in answers) and not all(answer["right"] for answer in answers),
        examples=examples,
        facts=model,
        counts=_counts(manifest.get("data", {})),
        versions=[(key, value) for key, value in manifest.get("versions", {}).items() if value],
        machine=_machine(manifest),
        config=list(plain_config(manifest.get("config", {}))),
        changed=_changed(changed, manifest.get("config", {})) if isinstance(changed, dict) else None,
        files=_files(folder, result.get("paths", {}), has_result=state is None),
    )


def _charts(measured: Mapping[str, Curve]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the charts, training and held-out loss in one of them, and the legend."""
    thinned = {name: curve.thin(POINTS) for name, curve in measured.items()}
    legend = [group("training", hue=0), group("held out", hue=1)]
    losses = [line(0, thinned["loss"])] if "loss" in thinned else []
    held_out = held_out_loss(thinned)
    losses += [line(1, thinned[held_out], smooth=False)] if held_out in thinned else []
    charts = [chart("loss", losses, "loss")] if losses else []
    if charts and held_out != "eval_loss":
        charts[0]["unit"] = ""  # not nats of a token
    for name, curve in thinned.items():
        if name in ("loss", held_out) or f"eval_{name}" in thinned:
            continue
        plain, drawn_together = name.removeprefix("eval_"), [line(int(name.startswith("eval_")), curve)]
        is_both = name != plain != "loss" and plain in thinned  # measured in training, too
        if is_both:
            drawn_together.insert(0, line(0, thinned[plain]))
        charts.append(chart(name, drawn_together) | ({"unit": ""} if is_both else {}))
    lines = [curve for item in charts for curve in item["lines"]]
    used = sorted({curve["group"] for curve in lines})
    for curve in lines:
        curve["group"] = used.index(curve["group"])
    return charts, [legend[index] for index in used]


def _measured(result: Mapping[str, Any], *, detail: bool) -> list[dict[str, str]]:
    metrics, intervals, gains = (result.get(key, {}) for key in ("metrics", "intervals", "gains"))
    plain = [key.removeprefix("base_").removeprefix("eval_") for key in metrics if re.match("(base_)?eval_", key)]
    names = [name for name in dict.fromkeys(plain) if is_detail(name) == detail]
    rows = []
    for name in names:
        interval, gain = intervals.get(f"eval_{name}"), gains.get(name)
        rows.append(
            {
                "name": metric_title(name),
                "before": format_value(metrics.get(f"base_eval_{name}"), name),
                "after": format_value(metrics.get(f"eval_{name}"), name),
                "interval": format_range(name, *interval) if interval else "",
                "gain": format_range(name, gain["low"], gain["high"], signed=True) if gain else "",
            }
        )
    return rows


def _tiles(metrics: Mapping[str, float], previous: str) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []
    for key, value in metrics.items():
        if key.startswith("eval_") and not is_detail(key) and key != "eval_perplexity" and len(tiles) < 3:
            base = metrics.get(f"base_{key}")
            note = f"{previous} {format_value(base, key)}" if base is not None else ""
            tiles.append((f"{metric_title(key)}, held out", format_value(value, key), note))
    speed = ("train_runtime", "train_tokens_per_second", "train_mfu", "train_data_wait")
    tiles += [(metric_title(key), format_value(metrics[key], key), "") for key in speed if metrics.get(key) is not None]
    if (peak := metrics.get("peak_memory_gb")) is not None:
        tiles.append(("peak memory", format_bytes(1e9 * peak), ""))
    return tiles


def _warnings(log: Path) -> list[str]:
    """Returns the warnings in the log, each once."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return list(dict.fromkeys(WARNED.findall(text)))


def base_metrics(folder: RunFolder, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns what the untuned base scored, by plain names: as the folder or else the run's metrics record it."""
    saved = (intact(lambda: read_record(folder.baseline)) or {}).get("metrics")
    if isinstance(saved, dict):
        with contextlib.suppress(ValueError):  # a number that is none
            return to_numbers(saved)
    prefix = "base_eval_"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = [{"text": visible(str(part["text"])), "trained": bool(part.get("trained"))} for part in row["parts"]]
    return {**row, "parts": parts}


def _changed(preset: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the full keys that differ from the preset, with the run's value and the preset's."""
    values = dict(flatten(dict(config)))
    return [(key, plain_value(values.get(key)), plain_value(value)) for key, value in preset.items()]


def _counts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, f"{data[key]:,}" if isinstance(data[key], int | float) else str(data[key]))
        for key, label in DATA_COUNTS.items()
        if data.get(key) or (key in SHOWN_IF_ZERO and key in data)
    ]


def _machine(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    hardware, code = manifest.get("hardware", {}), manifest.get("code", {})
    gpus = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in hardware.get("gpus", [])]
    rows = {
        "processor": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "memory": hardware.get("memory_gb") and f"{hardware['memory_gb']} GB",
        "GPUs": ", ".join(gpus),
        "driver": hardware.get("driver"),
        "CUDA": hardware.get("cuda"),
        "platform": manifest.get("platform"),
        "code": code.get("commit") and f"{code['commit'][:12]}{', with changes' if code.get('dirty') else ''}",
    }
    return [(label, str(value)) for label, value in rows.items() if value]


def _files(folder: RunFolder, paths: Mapping[str, str], *, has_result: bool) -> list[tuple[str, str]]:
    """Returns the files of the run's own folder: name and link."""
    names = {Path(path).name for path in paths.values() if Path(path).parent == folder.path}
    known = {"manifest.json", "history.json", "metrics.json", "baseline.json", "train.log", "config.yaml"}
    known |= {folder.base_predictions.name, folder.examples.name}
    there = {name for name in names | known if (folder.path / name).exists() and name != folder.report.name}
    there |= {"result.json"} if has_result else set()  # which is written behind the page
    return [(name, quote(name)) for name in sorted(there)]
