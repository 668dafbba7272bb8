"""Reads back the files of a run, or raises `DamagedFile`; numbers are read as floats.

NaN, infinite and null values stay what they are, and `cost` treats them as the worst.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

from qlora.config.saved_config import read_config
from qlora.errors import DamagedFile
from qlora.runtime.atomic_files import read_json, read_record

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
RESULTS = ("result.json", "evaluate.json", "predict.json")
"""The results of the tasks that measure a model, the most important first."""
NAMES = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}
"""Numbers that JSON cannot hold, by the texts that replace them."""
MANIFEST_PARTS = {"starts": list, **dict.fromkeys(("config", "data", "model", "versions", "hardware", "code"), dict)}
MAX_EXACT = 2**53
"""A float represents each integer up to this one exactly."""


class Status(Enum):
    """The status of a job."""

    queued = "queued"
    running = "running"
    finished = "finished"
    pruned = "pruned"
    failed = "failed"
    interrupted = "interrupted"
    """Ended from outside, with the sweep or the machine; it resumes from its checkpoint."""


def read_result(path: Path) -> dict[str, Any] | None:
    """Returns the result of a finished task, or None if it does not exist; raises `DamagedFile`."""
    record = read_record(path)
    if record is None:
        return None
    try:
        objective = record.get("objective")
        return {
            **record,
            "objective": None if objective is None else to_number(objective),
            "metrics": to_numbers(record["metrics"]),
            "intervals": {name: [to_number(low), to_number(high)]
                          for name, (low, high) in record.get("intervals", {}).items()},
            "gains": {name: {**to_numbers(gain), "low": to_number(gain["low"]), "high": to_number(gain["high"])}
                      for name, gain in record.get("gains", {}).items()},
            **({"answers": dict(record["answers"])} if "answers" in record else {}),
            "paths": {name: str(path) for name, path in record.get("paths", {}).items()},
        }  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(path, f"it is not a result; {type(error).__name__}: {error}") from error


def read_metrics(path: Path) -> dict[str, float] | None:
    """Returns a file's numbers by name, or None if it does not exist; raises `DamagedFile`."""
    record = read_record(path)
    try:
        return None if record is None else to_numbers(record)
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error


def read_history_file(path: Path) -> list[dict[str, Any]] | None:
    """Returns the log of `history.json` or of a checkpoint's `trainer_state.json`, its numbers as floats.

    None if it does not exist. Raises `DamagedFile`.
    """
    content = read_json(path)
    entries = content.get("log_history") if isinstance(content, dict) else content
    if content is None and not path.exists():
        return None
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise DamagedFile(path, "it does not hold a list of logged steps")
    return [_logged(path, entry) for entry in entries]


def _logged(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers of an entry; other values, such as a list that a callback logged, are left out."""
    numbers = {}
    for name, value in entry.items():
        with contextlib.suppress(ValueError):
            numbers[name] = value if type(value) is int and abs(value) < MAX_EXACT else to_number(value)
    if "step" in entry and not math.isfinite(numbers.get("step", math.nan)):
        raise DamagedFile(path, f"step {str(entry['step'])[:20]!r} is not a finite number")
    return numbers


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the manifest of a run, or None if it does not exist; raises `DamagedFile`."""
    record = read_record(path)
    for name, kind in MANIFEST_PARTS.items():
        if record is not None and not isinstance(record.get(name, kind()), kind):
            raise DamagedFile(path, f"{name} is not {'an object' if kind is dict else 'a list'}")
    return record


def read_status(path: Path) -> dict[str, Any] | None:
    """Returns a job's record with all its keys, or None if it does not exist; raises `DamagedFile`."""
    record = read_record(path)
    if record is None:
        return None
    overrides, reason, result = record.get("overrides", []), record.get("reason"), record.get("result")
    try:
        if not (isinstance(overrides, list) and all(isinstance(text, str) for text in overrides)):
            raise ValueError("overrides is not a list of texts")
        if not isinstance(reason, str | NoneType):
            raise ValueError("reason is not a text")
        if result is not None and not (isinstance(result, str) and re.fullmatch(r"\w+\.json", result)):
            raise ValueError("result is not the name of a file")
        seconds = None if record.get("seconds") is None else to_number(record["seconds"])
        status = Status(record.get("status")).value
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error
    known = {"overrides": overrides, "reason": reason, "result": result, "seconds": seconds, "status": status}
    return {**record, **known}


def read_progress(path: Path) -> dict[str, float] | None:
    """Returns the finite numbers of the latest training step, or None if it does not exist; raises `DamagedFile`."""
    numbers = read_metrics(path)
    if numbers is not None and not all(math.isfinite(numbers.get(name, math.nan)) for name in ("step", "max_steps")):
        raise DamagedFile(path, "step and max_steps are not finite numbers")
    return None if numbers is None else {name: value for name, value in numbers.items() if math.isfinite(value)}


def to_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of an object by name; raises `ValueError` for a value that is not a number."""
    numbers = {}
    for name, value in record.items():
        try:
            numbers[name] = to_number(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return numbers


def to_number(value: Any) -> float:
    """Returns a number of a JSON file as a float: null is NaN, and so is the text `nan`; else raises `ValueError`."""
    if value is None:
        return math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    sign, name = (-1, value[1:]) if isinstance(value, str) and value.startswith("-") else (1, value)
    if isinstance(name, str) and name.lower() in NAMES:
        return sign * NAMES[name.lower()]
    raise ValueError(f"{str(value)[:40]!r} is not a number")


def json_number(value: float | None) -> float | str | None:
    """Returns a number as JSON holds it, which `to_number` reads back: one that is not finite as its name."""
    return value if value is None or math.isfinite(value) else str(value)


def cost(value: float | None, *, maximizes: bool) -> float:
    """Returns a metric as a cost, lower is better; a value that is missing, NaN or infinite is the worst."""
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if maximizes else value


# Damage

READERS: dict[str, Callable[[Path], Any]] = {
    STATUS_FILE: read_status,
    "progress.json": read_progress,
    "config.yaml": read_config,
    "manifest.json": read_manifest,
    "metrics.json": read_metrics,
    "baseline.json": read_record,
    "history.json": read_history_file,
    **dict.fromkeys(RESULTS, read_result),
}
"""What reads back the files in a run's folder."""


def find_damage(folder: Path, *names: str) -> Iterator[DamagedFile]:
    """Yields what is wrong with the files in a run's folder, one error for each that cannot be read back."""
    for name, read in READERS.items():
        if not names or name in names:
            try:
                read(folder / name)
            except DamagedFile as error:
                yield error


def set_damage_aside(folder: Path, *names: str) -> None:
    """Renames damaged files in a run's folder, so that nothing reads them and the run can resume without them."""
    for error in find_damage(folder, *names):
        numbered = (error.path.with_name(f"{error.path.name}.damaged-{index}") for index in itertools.count(1))
        target = next(path for path in numbered if not path.exists())
        log.warning("%s is damaged (%s); it is kept as %s", error.path, error.reason, target.name)
        error.path.rename(target)
