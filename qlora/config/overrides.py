"""The grammar of overrides: read, written, made ready for Hydra, and checked against the fields and options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import OverrideParseException

from qlora.config import trust
from qlora.config.fields import field_type, in_free_mapping, key_exists, known_keys
from qlora.config.messages import explain
from qlora.config.options import CONF_DIR, takes_one_option
from qlora.config.override_spelling import keep_spelling
from qlora.config.search_path import KEY as SEARCH_PATH
from qlora.config.search_path import search_folders
from qlora.config.suggestions import unknown_key, unknown_option
from qlora.errors import ConfigError
from qlora.upstream.hydra import Hydra

LONGEST_KEY, DEEPEST = 500, 30
"""The maximum characters of a key, and the maximum depth of brackets in a value."""

CLEARED = ("trainer.lr_scheduler_kwargs", "trainer.optim_args")
"""Mappings that null or `{}` empties, since a recipe may have filled them."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise explain(error) from error


def override_value(text: str) -> Any:
    """Returns the value of `KEY=VALUE` as the command line reads it."""
    return plain_value(parse_overrides([text])[0].value())


def plain_value(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    return (
        {str(plain_value(key)): plain_value(item) for key, item in value.items()} if isinstance(value, dict) else value
    )


def write_override(key: str, value: Any) -> str:
    """Returns `KEY=VALUE` as the command line reads it back, with quotes where a text needs them."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"[\w./@+-]+", value, re.ASCII) and isinstance(override_value(f"key={value}"), str):
        return value
    # Hydra reads a backslash as such unless it stands before a quote.
    quoted = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + ("\\" if match[2] else "") + match[2], value)
    return '"' + quoted.replace("${", "\\${") + '"'


def open_entries(overrides: Sequence[str]) -> list[str]:
    """Returns overrides in the form that Hydra needs; a second call changes nothing.

    A text keeps its spelling. An entry of a free mapping is set whether it exists or not: `data.columns.output=x` and
    `data.columns={output: x}` get Hydra's `++`; `{}` takes all entries of some out.
    `from=FILE` becomes `source=FILE`: no field of a Python class can be called `from`. The value of
    QLORA_TRUSTED becomes an override, which every job of a sweep gets.
    """
    overrides = [f"source={text.removeprefix('from=')}" if text.startswith("from=") else text
                 for text in keep_spelling(overrides)]  # fmt: skip
    overrides = with_environment(overrides)
    keys = known_keys()
    return [
        _open_entry(text, override, keys) for text, override in zip(overrides, parse_overrides(overrides), strict=True)
    ]


def with_environment(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with those of QLORA_TRUSTED; a second call changes nothing."""
    return trust.add_environment(overrides, parse_overrides(overrides))


def _open_entry(text: str, override: Override, keys: frozenset[str]) -> str:
    key = override.key_or_group
    if key == SEARCH_PATH and not override.is_delete():  # relative to this folder, wherever a job runs
        return write_override(key, [f"file://{folder}" for folder in search_folders([override])])
    if override.value() == {} and key in CLEARED:  # Hydra merges mappings, so that an empty one would take nothing out
        return f"{override.get_key_element()}=null"
    is_mapping = isinstance(override.value(), dict) and get_origin(field_type(key)) is dict
    is_entry = is_mapping or in_free_mapping(key, keys)
    return f"++{text}" if override.type is OverrideType.CHANGE and is_entry else text


def refuse_unreadable(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for an override that is too long or too deep for its parsers, and that no config needs."""
    for text in overrides:
        key, _, value = text.partition("=")
        if len(key) > LONGEST_KEY:
            raise ConfigError(
                f"{key[:40]} ... is not a key: it has {len(key):,} characters, and keys have up to {LONGEST_KEY:,}; "
                "options are written KEY=VALUE, e.g. lora.r=16"
            )
        if _depth(value) > DEEPEST:
            raise ConfigError(
                f"{key}={value[:40]} ... opens more than {DEEPEST} brackets inside each other, which no value needs; "
                "put quotes around a text that holds brackets"
            )


def _depth(value: str) -> int:
    """Returns the maximum depth of brackets outside quotes."""
    depth = deepest = 0
    for sign in re.sub(r"""(["'])(?:\\.|(?!\1).)*\1""", "", value):
        depth += (sign in "[{(") - (sign in "]})")
        deepest = max(deepest, depth)
    return deepest


def check_keys(overrides: Sequence[str], hydra: Hydra) -> None:
    """Raises `ConfigError` for a key or a group's option that does not exist.

    Hydra finds most of these itself, but not an option of an `optional` entry of the defaults list (`recipe`), and
    for an unknown key it advises `+`, which would make a key that nothing reads.
    """
    loader = hydra.config_loader
    groups = set(loader.list_groups(""))
    keys = known_keys()
    for override in parse_overrides(overrides):
        key = override.key_or_group
        _refuse_several(override)
        if re.match(r"hydra\b", key):
            continue
        if override.package not in (None, "_global_"):
            raise ConfigError(f"{override.input_line}: an option stays in its group; write {key}=OPTION without the @")
        if key in groups:
            _check_choice(override, loader.get_group_options(key))
        elif not key_exists(key, keys):
            raise unknown_key(key, value=(override.input_line or "").partition("=")[2])
        elif override.is_delete():
            raise ConfigError(f"~{key}: a field cannot be removed; give it another value, or null if it may be unset")
        elif override.is_add() and not override.is_force_add() and key in keys:
            raise ConfigError(f"{override.input_line}: {key} exists; write it without the +")


def _refuse_several(override: Override) -> None:
    """Raises `ConfigError` for a list of options where a run has one; Hydra would take the last, or mix them."""
    group = override.key_or_group
    if takes_one_option(group, CONF_DIR) and any(isinstance(value, list) for value in possible_values(override)):
        several = f"-m {group}=A,B runs one after the other" if group != "sweep" else "start one sweep after the other"
        if group == "data":
            several += ", data=mix data.mix.a.path=A data.mix.b.path=B mixes them"
        raise ConfigError(f"{override.input_line}: {group} takes one option, and this is a list; name one; {several}")


def _check_choice(override: Override, options: Sequence[str]) -> None:
    group = override.key_or_group
    if override.is_delete():
        raise ConfigError(f"~{group}: a run needs every group; choose an option instead, e.g. {group}=none")
    for choice in [
        item for value in possible_values(override) for item in (value if isinstance(value, list) else [value])
    ]:
        if choice is None:
            remedy = (
                "leave it out" if group in ("experiment", "sweep") else f"choose one of {', '.join(sorted(options))}"
            )
            raise ConfigError(f"{group}=null: a group takes the name of an option; {remedy}")
        if isinstance(choice, dict):
            raise ConfigError(
                f"{group}={{...}}: name an option of {group} and set single fields with {group}.FIELD=VALUE"
            )
        if choice is not None and str(choice) not in options:
            raise unknown_option(group, str(choice), options)


def possible_values(override: Override) -> list[Any]:
    """Returns what an override may become: all elements of a sweep, or its one value."""
    if override.is_sweep_override() and override.is_discrete_sweep():
        return list(override.sweep_iterator())
    return [] if override.is_sweep_override() else [override.value()]
