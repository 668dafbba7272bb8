"""The end of a run on the screen: its metrics before and after, some answers, its files, what to type next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.config.trained_run import find_run
from qlora.config.trust import REMOTE_CODE
from qlora.runtime import console
from qlora.runtime.program import program_name
from qlora.runtime.run_folder import find_adapter
from qlora.text import format_range, is_detail, quoted

OF_BASE = ("model", "quantization", "experiment=", "base=")
"""How overrides begin that say which base an adapter without its run's config belongs to."""
TRUSTED = ("trusted=", f"{REMOTE_CODE}=")
"""Overrides that no stored config may replace."""
NEXT = {
    "train": ("chat", "evaluate", "merge", "board"),
    "evaluate": ("chat", "predict", "merge"),
    "predict": ("chat", "evaluate", "merge"),
}
"""The tasks that come after another one."""
SHORT = re.compile(r"[\w.][\w./+-]*|/[\w./+-]+")
"""A path that may stand as a bare word behind a task's name."""


def print_summary(
    title: str,
    result: Mapping[str, Any],
    predictions: Iterable[Mapping[str, Any]],
    *,
    config: Config,
    folder: Path,
    next_steps: Sequence[str],
) -> None:
    """Prints a result, its files, and the commands that come next."""
    metrics = result["metrics"]
    names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not is_detail(key)]
    rows = [
        (name, metrics.get(f"base_eval_{name}"), metrics[f"eval_{name}"], describe_certainty(name, result))
        for name in names
    ]
    console.summary(
        f"{title}: {short_path(folder)}",
        rows,
        [dict(row) for row in predictions][: config.evaluation.show_predictions],
        [(name, short_path(path)) for name, path in result["paths"].items()],
        list(next_steps),
    )


def next_commands(
    task: str,
    adapter: str | None,
    folder: Path,
    overrides: Sequence[str],
    *,
    options: Sequence[str] = (),
    left_out: Sequence[str] = (),
    writes: bool = True,
) -> list[str]:
    """Returns the commands that come after `task`, for what `adapter`, or else the run's folder, holds.

    A run's own config says the rest but whom to trust. Where there is none, the overrides that name the base are
    repeated, except those that begin with one of `left_out`, with the `options` by which the user's own files are
    found. Where the model `writes` no text, no command is one that lets it.
    """
    name = adapter if adapter == "none" else short_path(adapter or folder)
    args = [name if SHORT.fullmatch(name) else f"adapter={quoted(name)}"]
    if find_run(adapter, folder) is not None:
        args += [text for text in overrides if text.startswith(TRUSTED)]
    else:
        kept = [text for text in overrides if text.startswith((*OF_BASE, *TRUSTED))]
        args += [text for text in kept if not text.startswith(tuple(left_out))]
        args += options
    merges = name != "none" and find_adapter(Path(name).expanduser())[0] is not None
    following = [use for use in NEXT[task] if use != "merge" or merges]
    if not writes:
        following = ["predict" if use == "chat" else use for use in following if use != "merge"]
        following = list(dict.fromkeys(use for use in following if use != task))
    return [shlex.join([*program_name(), use, *(args if use != "board" else [])]) for use in following]


def describe_certainty(name: str, result: Mapping[str, Any]) -> str:
    """Returns the 95 % interval of a metric as text, with the paired difference to the untuned base."""
    interval, gain = result.get("intervals", {}).get(f"eval_{name}"), result.get("gains", {}).get(name)
    if interval is None:
        return ""
    text = f"95 %: {format_range(name, *interval)}"
    if gain is None:
        return text
    return f"{text}; gain {format_range(name, gain['low'], gain['high'], signed=True)}"
