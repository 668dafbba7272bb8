"""`qlora --explain KEY`: the value of a key, what set it, its type and its meaning."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qlora.config.checked_loader import CheckedLoader
from qlora.config.command import compose_command
from qlora.config.default_values import default_options
from qlora.config.fields import SCALARS, dotted, field_type, in_words, key_exists, known_keys, split_key, type_at
from qlora.config.help import describe_default, field_meaning, group_fields, group_meaning, options, wrapped
from qlora.config.options import ANYWHERE, CONF_DIR, group_names, option_names
from qlora.config.overrides import parse_overrides, write_override
from qlora.config.schema.values import written
from qlora.config.suggestions import unknown_key
from qlora.text import listed
from qlora.upstream.omegaconf import is_filled, raw_node, raw_value

MOST_OTHERS = 6
"""Up to this number of other values, each is shown with the choices that bring it."""
WIDTH = 12
"""Where the second column begins."""


def print_explanation(
    key: str, overrides: Sequence[str], config_dir: str | None = None, *, multirun: bool = False
) -> None:
    """Prints what a key is under a command; raises `ConfigError` for a key that does not exist."""
    key = key.partition("=")[0].lstrip("+~").strip(".")
    key = "source" if key == "from" else key
    if not (key in group_names() or key.startswith("hydra.") or key_exists(key, known_keys())):
        raise unknown_key(key)
    composed = compose_command(overrides, config_dir, multirun=multirun, leave_grid=True, is_read=True)
    print("\n".join(_lines(key, composed.node, parse_overrides(overrides))))


def _lines(key: str, composed: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    if key in group_names():
        yield from _group_lines(key, composed, overrides)
        return
    yield f"{_named(key)} = {_show(_value(composed, key))}"
    files, typed = [*_files(key)], [*_overrides(key, overrides)]
    setters = [*(file.label for file in files), *typed]
    default = describe_default(key)
    last, *others = [*reversed(setters), *([f"the default of the schema, {default}"] if default else [])] or ["Hydra"]
    yield from _row("set by", last)
    for other in others:
        yield from _row("instead of", other)
    yield from _row(
        "type", in_words(key) if field_type(key) is not None else SCALARS.get(type_at(split_key(key)), "any")
    )
    if meaning := field_meaning(key):
        yield from _row("means", meaning)
    if not typed:
        for other in _elsewhere(key, files, composed.hydra.runtime.choices):
            yield from _row("but", other)


def _elsewhere(key: str, files: Sequence[_File], choices: Mapping[str, Any]) -> list[str]:
    """Returns the other values that our files set, each with the choices that bring it.

    A group is the first name of a key; a recipe, chosen by model and data, sets keys of all groups and wins.
    """
    value = files[-1].value if files else _schema_default(key)
    others: dict[str, list[str]] = {}
    below = [file for file in files if file.group not in ANYWHERE]
    if files and files[-1].group in ANYWHERE:
        others[below[-1].value if below else _schema_default(key)] = ["any other model or data"]
    group = split_key(key)[0]
    for name in (*ANYWHERE, group):
        by_data = _by_data().get(name, ())
        for option in option_names(name):
            label = _set_by(key, name, option) or (_schema_default(key) if option in by_data else None)
            if label is not None and label != value and option != choices.get(name):
                others.setdefault(label, []).append(_chosen_by(name, option, by_data))
    if len(others) > MOST_OTHERS:
        return [f"{len(others)} other values with other options of {group}, or with other models and data"]
    return [f"{label} with {listed(chosen, MOST_OTHERS)}" for label, chosen in others.items() if label != value]


def _set_by(key: str, group: str, option: str) -> str | None:
    """Returns what one of our files sets a key to; None: it does not set it."""
    node: Any = OmegaConf.load(CONF_DIR / group / f"{option}.yaml")
    for name in split_key(key)[0 if group in ANYWHERE else 1 :]:
        node = raw_node(node, name) if OmegaConf.is_dict(node) else None
    return None if node is None else _plain(_show(node))


def _plain(text: str) -> str:
    """Returns the number of `${qlora.default:NUMBER,KEY}`, or that of most rows of `${qlora.streamed:VALUE,OTHER}`."""
    match = re.fullmatch(r"\$\{qlora\.default:(.+),\w+\}|\$\{qlora\.streamed:[^,]+,(.+)\}", text)
    return (match[1] or match[2]) if match else text


def _schema_default(key: str) -> str:
    return describe_default(key) or "null"


def _by_data() -> dict[str, tuple[str, str]]:
    """Returns the groups that `data` chooses an option of: for rows of the user's own, and for all other sets."""
    text = (CONF_DIR / "config.yaml").read_text(encoding="utf-8")
    matches = re.findall(r"^  - (\w+): \$\{qlora\.by_data:\$\{data\},([\w-]+),([\w-]+)\}", text, re.MULTILINE)
    return {group: (local, other) for group, local, other in matches}


def _chosen_by(group: str, option: str, by_data: Sequence[str]) -> str:
    """Returns what chooses an option: a word, the rows, or of a recipe its model and maybe its data."""
    if group in ANYWHERE:
        model, _, data = option.partition("_")
        return f"model={model}{' and your own rows' if data == 'own' else f' data={data}' if data else ''}"
    rows = ("your own rows", "data=demo and the paper's sets")[by_data.index(option)] if option in by_data else ""
    return f"{rows} ({group}={option})" if rows else f"{group}={option}"


def _group_lines(group: str, composed: DictConfig, overrides: Sequence[Override]) -> Iterator[str]:
    """Yields the option of a group, what chose it, and the values of its fields."""
    choice = composed.hydra.runtime.choices.get(group)
    yield f"{group} = {choice or 'null'}"
    chosen = [word.input_line or "" for word in overrides if word.key_or_group == group]
    is_default = choice == default_options().get(group)
    by_file = "conf/config.yaml, as the default" if is_default else "the defaults of a file"
    yield from _row("set by", f"the word {chosen[-1]}" if chosen else by_file)
    yield from _row("means", options(group).get(str(choice), "") or group_meaning(group))
    fields = [key for key, _ in group_fields(group)]
    if fields:
        yield ""
    for key in fields:
        value = _value(composed, key)
        if not dataclasses.is_dataclass(field_type(key)):
            yield f"  {key} = {_show(value)}"


def _value(composed: DictConfig, key: str) -> Any:
    """Returns what a key holds, references to others as they are written; None too where what holds it is null."""
    node: Any = composed
    for name in split_key(key):
        if OmegaConf.is_list(node):
            node = node[int(name.strip("[]"))] if name.strip("[]").isdigit() else None
        else:
            node = raw_node(node, name) if OmegaConf.is_dict(node) and is_filled(node) else None
    return node


def _show(value: Any) -> str:
    """Returns a value as the command line writes it, a text without quotes."""
    value = raw_value(value)
    if OmegaConf.is_config(value):
        return write_override("", OmegaConf.to_container(value, resolve=False, enum_to_str=True))[1:]
    return written(value)


class _File(NamedTuple):
    """A file that sets a key."""

    label: str
    group: str
    value: str


def _files(key: str) -> Iterator[_File]:
    """Yields the files that set a key, in the order in which they were read."""
    for loaded in CheckedLoader.read:
        node: Any = loaded.config
        for name in split_key(key):
            node = raw_node(node, name) if OmegaConf.is_dict(node) else None
            if node is None:
                break
        if node is not None:
            group, _, option = loaded.config_path.rpartition("/")
            chosen = f" ({group}={option})" if group else ""
            yield _File(f"{loaded.file}{chosen}", group, _plain(_show(node)))


def _overrides(key: str, overrides: Sequence[Override]) -> Iterator[str]:
    """Yields the overrides that set a key, a part of it, or what holds it."""
    for override in overrides:
        name = override.key_or_group
        is_group = name in group_names() and not isinstance(override.value(), dict)
        if not is_group and (key == name or key.startswith((f"{name}.", f"{name}[")) or name.startswith(f"{key}.")):
            yield f"the word {override.input_line}{', each value in turn' if override.is_sweep_override() else ''}"


def _named(key: str) -> str:
    return dotted(split_key(key))


def _row(label: str, text: str) -> list[str]:
    return wrapped(text, f"  {label:<{WIDTH}}", WIDTH + 2)
