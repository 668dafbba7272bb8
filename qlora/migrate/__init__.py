"""`task=migrate`: turns a config of another project into a command of this one, and says what of it was lost.

What each key becomes stands in tables, one module per project; the resulting command is composed before it is shown.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.compose import compose
from qlora.config.options import group_names
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import override_value
from qlora.config.paths import short_path
from qlora.config.saved_config import write_yaml
from qlora.config.schema import Config
from qlora.config.trust import REMOTE_CODE
from qlora.errors import ConfigError, DataError, UserError, did_you_mean
from qlora.migrate.recognise import recognise
from qlora.migrate.translation import Dialect, Reading, translate
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text
from qlora.runtime.program import program_name
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.task_result import TaskResult

MAX_REFUSED = 8
"""Overrides that may turn out impossible together before the file is given up."""


def migrate(config: Config, output_dir: Path) -> TaskResult:
    """Translates `from=FILE`, prints the command and what was lost, and writes both and an experiment to the folder."""
    assert config.source is not None, "Config checks it"
    dialect, reading = read(Path(config.source).expanduser())
    overrides = reading.overrides
    folder = RunFolder(output_dir)
    folder.create()
    name = re.sub(r"[^\w.-]+", "-", Path(config.source).stem) or "migrated"
    experiment = output_dir / "conf" / "experiment" / f"{name}.yaml"
    typed = [text for text in overrides if text.startswith((f"{REMOTE_CODE}=", "hydra."))]  # no file may say them
    in_file = [text for text in overrides if text not in typed]
    write_text(experiment, _as_experiment(in_file, f"{dialect.name}: {Path(config.source).name}"))
    if compose([f"experiment={name}", *typed], output_dir / "conf") != reading.config:
        raise AssertionError(f"{experiment} says something else than the command")
    result = TaskResult(
        "migrate",
        {"migrate_overrides": len(overrides), "migrate_lost": len(reading.lost)},
        {"migrate": str(folder.result("migrate")), "experiment": str(experiment)},
        more={
            "from": dialect.name,
            "overrides": overrides,
            "command": shlex.join(["qlora", *overrides]),
            "lost": _entries(reading.lost),
            "same": _entries(reading.same),
            "defaults_of": f"{dialect.name} {dialect.version}",
        },
    )
    write_text(folder.result("migrate"), json.dumps(result.to_dict(), indent=2, default=str) + "\n")
    _print(dialect, reading, config.source)
    console.say()
    arguments = ["--config-dir", short_path(output_dir / "conf"), f"experiment={name}", *typed]
    console.say(Text("As an experiment", style="bold"))
    console.say_command(shlex.join([*program_name(), *arguments]))
    console.say()
    console.say_rows([("migrate", short_path(folder.result("migrate")))])
    return result


def _entries(settings: list[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    return [{"key": key, "value": value, "why": why} for key, value, why in settings]


def read(path: Path) -> tuple[Dialect, Reading]:
    """Returns the dialect of a file and its translation, whose overrides compose to its config.

    Raises a `UserError` for any other file, or one that does not describe training on answers.
    """
    if not path.is_file():
        siblings = [str(entry) for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(
            f"from={path}: no such file{did_you_mean(str(path), siblings)}; give the path of a config or a script"
        )
    dialect, settings = recognise(path)
    try:
        reading = translate(dialect, settings, {"folder of the file": str(path.parent)})
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise DataError(
            f"from={path}: a value has another form than {dialect.name} documents ({error}); fix it there first"
        ) from error
    return dialect, _composable(reading, path)


def _composable(reading: Reading, path: Path) -> Reading:
    """Composes the overrides; one that conflicts with the others is left out, with the message of the error."""
    overrides, lost = list(reading.overrides), list(reading.lost)
    for _ in range(MAX_REFUSED):
        composed = _composed(overrides)
        if isinstance(composed, Config):
            return Reading(overrides, lost, reading.same, composed)
        refused = str(composed)
        culprit = next((text for text in reversed(overrides) if _composes(_without(overrides, text))), None)
        culprit = culprit or next((text for text in reversed(overrides) if text.partition("=")[0] in refused), None)
        if culprit is None:
            raise DataError(f"from={path}: its settings cannot be composed: {refused}")
        overrides = _without(overrides, culprit)
        lost.append((culprit.partition("=")[0], culprit.partition("=")[2], f"left out: {refused}"))
    raise DataError(f"from={path}: its settings cannot be composed: {refused}")


def _composed(overrides: list[str]) -> Config | UserError:
    """Returns the config of overrides, or why there is none."""
    try:
        return compose(overrides)
    except UserError as error:
        return error


def _composes(overrides: list[str]) -> bool:
    return isinstance(_composed(overrides), Config)


def _without(overrides: list[str], text: str) -> list[str]:
    return [override for override in overrides if override != text]


def _as_experiment(overrides: list[str], title: str) -> str:
    """Returns the overrides as an option of the group `experiment`."""
    groups, defaults, tree = group_names(), [], dict[str, Any]()
    for text in keep_spelling(overrides):
        key, value = text.partition("=")[0], override_value(text)
        if key in groups:
            defaults.append({f"override /{key}": value})
            continue
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    body = write_yaml({"defaults": [*defaults, "_self_"], **tree})
    return f"# @package _global_\n# From {title}\n{body}"


def _print(dialect: Dialect, reading: Reading, source: str) -> None:
    whose = f"{source}: {dialect.name}, with the defaults of its version {dialect.version}"
    console.start_screen([("from", whose), ("overrides", str(len(reading.overrides)))])
    console.say(f"{shlex.join(program_name())} \\")
    for count, text in enumerate(reading.overrides, 1):
        console.say(f"  {shlex.quote(text)}" + (" \\" if count < len(reading.overrides) else ""), whole=True)
    console.say()
    if not reading.lost:
        console.say(Text("Every setting was translated, and every default kept.", style="bold"))
        return
    console.say(Text(f"Not translated, or not the same ({len(reading.lost)})", style="bold"))
    console.say_rows(
        [(f"{key}={_short(value)}" if value is not None else key, why) for key, value, why in reading.lost]
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
