"""Forms that people type for a model or their own rows, read as the overrides that they stand for.

`model=OWNER/NAME` is the preset of that hub id, else `model.name=`; `data=FILE` is `data=local data.path=FILE`, and so
is `data.path=FILE` where nothing else chooses a data set. A second reading changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig

from qlora.config.default_values import default_options
from qlora.config.fields import known_keys
from qlora.config.options import CONF_DIR, MANY, group_names, model_presets
from qlora.config.overrides import parse_overrides, plain_value, possible_values, write_override
from qlora.config.paths import is_row_file
from qlora.config.schema.code_names import FUNCTION_PATH
from qlora.errors import ConfigError

OWN_ROWS = "local"
"""The option of `data` for rows of the user's own."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/tree/[\w.-]+)?/?"
)
NAMED = ("model", "data", "adapter", "experiment", "task", "name")
SOURCES = (
    *("model.name", "model.tokenizer", "data.path", "data.eval_path", "lora.start", "hydra.run.dir", "hydra.sweep.dir"),
    *("from", "run", "repo", "evaluation.path"),
)
"""Keys of a file, a folder or a hub id."""
CHOOSERS = ("experiment", "sweep")
"""Groups whose options may choose the model or the data."""


@dataclass(frozen=True)
class Reading:
    """Overrides, and what is said of how they were read."""

    overrides: list[str]
    read_as: dict[str, str] = field(default_factory=dict)
    """What was typed, and what it stands for: `data=my.jsonl`, and `data=local data.path=my.jsonl`."""
    outdone: tuple[str, ...] = ()
    """Overrides that a later one of the same key outdoes, in words."""


def read_forms(overrides: Sequence[str], folders: Sequence[Path] = ()) -> Reading:
    """Returns the overrides that some stand for; `folders` hold the user's own options.

    Raises `ConfigError` for a sweep over presets and other models at once, or over options and files.
    """
    given = parse_overrides(overrides)
    groups = {*group_names()} - {*MANY}
    last = _last(override for override in given if _is_plain(override, groups))
    parsed = [override for override in given if not _is_plain(override, groups) or override in last.values()]
    keys = {override.key_or_group for override in parsed}
    result, read_as = list[str](), dict[str, str]()
    for override in parsed:
        text = override.input_line or ""
        if spelled := _read_one(override, keys, [CONF_DIR, *folders]):
            read_as[text] = " ".join(spelled)
        result += spelled or [text]
    return Reading(result, read_as, (*_outdone(given, groups), *_outdone(parse_overrides(result), known_keys())))


def check_own_rows(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises `ConfigError` where rows of the user's own would be measured on the held-out rows of the embedded set.

    That is where a file might have chosen the data set, and has not.
    """
    given = {override.key_or_group: override.input_line for override in parse_overrides(overrides)}
    embedded = default_options()["data"]
    if given.get("data.path") and "data" not in given and composed.hydra.runtime.choices.get("data") == embedded:
        raise ConfigError(
            f"{given['data.path']}: no file chooses a data set, so the held-out rows and the lengths would be those of "
            f"data={embedded}; add data={OWN_ROWS}"
        )


def _last(overrides: Iterable[Override]) -> dict[str, Override]:
    return {override.key_or_group: override for override in overrides}


def _outdone(parsed: Sequence[Override], keys: Collection[str]) -> Iterator[str]:
    """Yields what is said of each of these keys that is given twice: the last one counts."""
    plain = [override for override in parsed if _is_plain(override, keys)]
    last = _last(plain)
    for override in plain:
        text, counts = override.input_line, last[override.key_or_group].input_line
        if text != counts:
            yield f"{counts} counts, {text} before it does not"


def _is_plain(override: Override, keys: Collection[str]) -> bool:
    """Returns whether an override sets one of these keys as a whole: one behind it leaves nothing of it."""
    is_plain = override.type is OverrideType.CHANGE and override.package is None
    return is_plain and override.key_or_group in keys and not isinstance(override.value(), dict)


def _read_one(override: Override, keys: set[str], folders: Sequence[Path]) -> list[str]:
    """Returns the overrides that one stands for; none: it stands for itself."""
    key = override.key_or_group
    if override.type is not OverrideType.CHANGE or override.package is not None:
        return []
    _refuse_nothing(override)
    if key == "data.path" and not keys & {"data", *CHOOSERS} and override.value() is not None:
        return [f"data={OWN_ROWS}", override.input_line or ""]
    if key == "tracking" and isinstance(chosen := override.value(), list) and chosen:
        first, *others = (plain_value(value) for value in chosen)
        return [write_override(key, first), *([write_override("tracking.also", others)] if others else [])]
    if key not in ("model", "data"):
        return []
    typed = [plain_value(value) for value in possible_values(override)]
    if not typed or not all(isinstance(value, str) for value in typed):
        return []
    values = [_without_hub(value) for value in typed]
    names = [_preset(value) if key == "model" and not _is_option(key, value, folders) else value for value in values]
    others = [name for name in names if not _is_option(key, name, folders) and _names_source(key, name)]
    if not others:
        return [_write(key, names)] if names != typed else []
    if len(others) < len(names):
        other = next(name for name in names if name not in others)
        raise ConfigError(
            f"{key}={other} is an option of {key}, and {others[0]} is none: one sweep takes one kind; start one with "
            f"-m {_write(key, [name for name in names if name not in others])}, one with {key}={others[0]}"
        )
    if key == "data":
        return [f"data={OWN_ROWS}", _write("data.path", names)]
    default = [f"model={default_options()['model']}"] if keys & {*CHOOSERS} else []  # its shape, not a file's choice
    return [*default, _write("model.name", names)]


def _refuse_nothing(override: Override) -> None:
    """Raises `ConfigError` for `data.path=`, as a variable of the shell leaves it that is not set: an empty text would
    be the folder here."""
    key = override.key_or_group
    if (key in NAMED or key in SOURCES) and (override.input_line or "").partition("=")[2].strip() in ("", "''", '""'):
        raise ConfigError(f"{key}= has no value (is a variable of the shell not set?); write {key}=VALUE")


def _without_hub(text: str) -> str:
    """Returns the id that a page of the hub shows: `OWNER/NAME` for `https://huggingface.co/OWNER/NAME`."""
    match = HUB_PAGE.fullmatch(text)
    return match[1] if match else text


def _write(key: str, values: Sequence[str]) -> str:
    """Returns the override that sets a key to a value, or to several in turn."""
    return ",".join([write_override(key, values[0]), *(write_override("", value)[1:] for value in values[1:])])


def _is_option(group: str, name: str, folders: Sequence[Path]) -> bool:
    return any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _preset(name: str) -> str:
    """Returns the preset of a hub id, whose capitals do not count; other names as they are."""
    ids = {str(preset["name"]).lower(): option for option, preset in model_presets().items()}
    return ids.get(name.lower(), name) if HUB_ID.fullmatch(name) and not Path(name).exists() else name


def _names_source(group: str, text: str) -> bool:
    """Returns whether a text is a path, an address, a hub id or a function, and not a misspelled option."""
    if "://" in text:
        return group == "data"
    if text.startswith((".", "~", "/")) or HUB_ID.fullmatch(text) or "/" in text or Path(text).is_dir():
        return True
    return group == "data" and (is_row_file(text) or bool(FUNCTION_PATH.fullmatch(text)) or Path(text).is_file())
