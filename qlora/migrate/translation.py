"""The rules by which a key of another project becomes overrides, and the pass over a config that applies them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.config.overrides import write_override
from qlora.config.schema import Config
from qlora.errors import did_you_mean


@dataclass(frozen=True)
class Lost:
    """The setting has no counterpart; `why` says so, or what to do instead."""

    why: str
    key: str = ""
    """The other project's key, if it is not the key of the rule."""


@dataclass(frozen=True)
class Move:
    """The value becomes that of our key; `values` translates it, and a value that is missing there is lost."""

    key: str
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Pick:
    """Each value has its own overrides; a value that is missing is lost with `otherwise` as the reason."""

    choices: Mapping[Any, tuple[str, ...]]
    otherwise: str = "there is no such choice here"


@dataclass(frozen=True)
class Same:
    """The setting needs no override, because the behaviour here is the same or it has no effect on a run."""

    why: str = ""
    key: str = ""
    """The other project's key, if it is not the key of the rule."""


@dataclass(frozen=True)
class OnlyIf:
    """The setting needs no override for these values; any other value is lost with `why` as the reason."""

    harmless: tuple[Any, ...]
    why: str


Rule = Move | Pick | Same | OnlyIf | Lost
Part = str | Lost | Same

UNSET: tuple[Any, ...] = (None, "", [], {})
OFF = (*UNSET, False, 0, "none", "no")
"""Values that have the same effect as leaving the option out."""


class Settings(dict[str, Any]):
    """What another project's config sets, with that project's defaults behind; it remembers which keys were read."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(given)
        self.defaults = defaults or {}
        self.read: set[str] = set()

    def look(self, key: str, default: Any = None) -> Any:
        """Returns the value that is set, else the project's default, else `default`."""
        value = self.get(key)
        return self.defaults.get(key, default) if is_unset(value) else value

    def take(self, key: str, default: Any = None) -> Any:
        """As `look`, and records that the key was read."""
        self.read.add(key)
        return self.look(key, default)


def is_unset(value: Any) -> bool:
    """Tells whether a value has the same effect as leaving the key out: null, an empty text, list or mapping."""
    return not isinstance(value, bool | int | float) and value in UNSET


Joint = Callable[[Settings], Iterator[Part]]
"""A function that reads several keys together, each with `take`."""


@dataclass(frozen=True)
class Dialect:
    """The config language of another project."""

    name: str
    """The name of the project."""
    version: str
    """The version of the project whose defaults and keys these are."""
    model_key: str
    """The key that names the base model, which every config of the project has."""
    keys: frozenset[str]
    """All keys that the project knows; full keys, but for torchtune, whose components have keys of their own."""
    defaults: Mapping[str, Any]
    """What the project does where a config leaves a key out, in its own keys and values."""
    fixed: tuple[str, ...]
    """What the project always does, as overrides; what the rules say takes precedence."""
    rules: Mapping[str, Rule]
    """Rules by full key, e.g. `optimizer.lr`."""
    joints: tuple[Joint, ...]
    prefixes: Mapping[str, Rule] = field(default_factory=dict)
    """Rules for all keys that begin with a prefix."""

    def rule(self, key: str) -> Rule | None:
        """Returns the rule for a key that no joint reads."""
        rule = self.rules.get(key)
        return rule or next((rule for prefix, rule in self.prefixes.items() if key.startswith(prefix)), None)

    def knows(self, key: str) -> bool:
        """Tells whether the project has a key."""
        return key in self.keys or self.rule(key) is not None


@dataclass
class Reading:
    """The translation of a config."""

    overrides: list[str]
    lost: list[tuple[str, Any, str]] = field(default_factory=list)
    """The key, value and reason of each setting that was not translated, or means something else here."""
    same: list[tuple[str, Any, str]] = field(default_factory=list)
    """The key, value and reason of each setting that was given and needs no override."""
    config: Config | None = None
    """What the overrides compose to, once they were composed."""


def translate(dialect: Dialect, given: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> Reading:
    """Returns the overrides for a config, with the settings that were lost.

    `origin` holds what is known of the file itself, for joints to `look` at.
    """
    settings = Settings(given, {**dialect.defaults, **(origin or {})})
    reading = Reading(list(dialect.fixed))
    for joint in dialect.joints:
        for part in joint(settings):
            _note(reading, part, "", settings)
    for key in dict.fromkeys((*dialect.defaults, *given)):
        value = settings.look(key)
        if key in settings.read or is_unset(value):
            continue
        for part in _apply(dialect, key, value):
            _note(reading, part, key, settings)
    reading.overrides = _last_of_each(reading.overrides)
    return reading


def _note(reading: Reading, part: Part, key: str, settings: Settings) -> None:
    if isinstance(part, str):
        reading.overrides.append(part)
        return
    key = part.key or key
    value = _value(settings, key)
    if isinstance(part, Lost) and (key, value, part.why) not in reading.lost:
        reading.lost.append((key, value, part.why))
    elif isinstance(part, Same) and value is not None:
        reading.same.append((key, value, part.why))


def _value(settings: Settings, key: str) -> Any:
    """Returns what a config sets; keys of an entry of a list are written `datasets[0].type`."""
    entry = re.fullmatch(r"(\w+)\[(\d+)\]\.(.+)", key)
    if entry is None:
        return settings.get(key)
    entries, number, name = settings.get(entry[1]), int(entry[2]), entry[3]
    if not isinstance(entries, list) or number >= len(entries) or not isinstance(entries[number], dict):
        return None
    return entries[number].get(name)


def _apply(dialect: Dialect, key: str, value: Any) -> Iterator[Part]:
    match dialect.rule(key):
        case None if key in dialect.keys:
            yield Lost("no counterpart is known")
        case None:
            yield Lost(f"{dialect.name} {dialect.version} has no such key{did_you_mean(key, dialect.keys)}")
        case Move(ours, None):
            yield write_override(ours, value)
        case Move(ours, values) if values is not None and _key(value) in values:
            yield write_override(ours, values[_key(value)])
        case Pick(choices) if _key(value) in choices:
            yield from choices[_key(value)]
        case Pick(_, otherwise):
            yield Lost(otherwise)
        case Move(ours):
            yield Lost(f"{ours} has no such value")
        case OnlyIf(harmless, why):
            yield Same(why) if value in harmless else Lost(why)
        case Lost(why):
            yield Same(why) if value in OFF else Lost(why)
        case Same(why):
            yield Same(why)


def _key(value: Any) -> Any:
    if isinstance(value, list | dict):
        return str(value)
    return value.lower() if isinstance(value, str) else value


def _last_of_each(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides with the last value of each key; groups come first, because single keys override them."""
    last = {text.partition("=")[0]: text for text in overrides}
    return sorted(last.values(), key=lambda text: "." in text.partition("=")[0])


def read_number(text: str) -> int | float | str:
    """Returns a number that a text writes, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
