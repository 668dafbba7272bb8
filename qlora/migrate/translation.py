"""The rules by which a key of another project becomes overrides, and the pass over a config that applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.config.overrides import write_override


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
    """The setting needs no override, because the behaviour here is the same."""

    why: str = ""


@dataclass(frozen=True)
class OnlyIf:
    """The setting needs no override for these values; any other value is lost with `why` as the reason."""

    harmless: tuple[Any, ...]
    why: str


Rule = Move | Pick | Same | OnlyIf | Lost
Part = str | Lost

UNSET: tuple[Any, ...] = (None, "", [], {})
OFF = (*UNSET, False, 0, "none", "no")
"""Values that have the same effect as leaving the option out."""


class Settings(dict[str, Any]):
    """The settings of another project's config; it remembers which of them were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.read: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a value, or `default` if it is unset, and records that the key was read."""
        self.read.add(key)
        value = self.get(key)
        return default if value in UNSET else value


Joint = Callable[[Settings], Iterator[Part]]
"""A function that reads several keys together, each with `take`."""


@dataclass(frozen=True)
class Dialect:
    """The config language of another project."""

    name: str
    """The name of the project."""
    defaults: tuple[str, ...]
    """The project's defaults that differ from ours, as overrides; what a config sets takes precedence."""
    rules: Mapping[str, Rule]
    """Rules by full key, e.g. `optimizer.lr`."""
    joints: tuple[Joint, ...]
    prefixes: Mapping[str, Rule] = field(default_factory=dict)
    """Rules for all keys that begin with a prefix."""


@dataclass
class Reading:
    """The translation of a config."""

    overrides: list[str]
    lost: list[tuple[str, Any, str]]
    """The key, value and reason of each setting that was not translated."""


def translate(dialect: Dialect, settings: Mapping[str, Any]) -> Reading:
    """Returns the overrides for a config, and the settings that were lost."""
    unread = Settings(settings)
    reading = Reading(list(dialect.defaults), [])
    for joint in dialect.joints:
        for part in joint(unread):
            _note(reading, part, "", unread)
    for key, value in settings.items():
        if key in unread.read:
            continue
        rule = dialect.rules.get(key) or next(
            (rule for prefix, rule in dialect.prefixes.items() if key.startswith(prefix)), None
        )
        if value in UNSET and not isinstance(value, bool):
            continue
        for part in _apply(rule, value):
            _note(reading, part, key, unread)
    reading.overrides = _last_of_each(reading.overrides)
    return reading


def _note(reading: Reading, part: Part, key: str, settings: Settings) -> None:
    if isinstance(part, str):
        reading.overrides.append(part)
    else:
        lost_key = part.key or key
        reading.lost.append((lost_key, settings.get(lost_key), part.why))


def _apply(rule: Rule | None, value: Any) -> Iterator[Part]:
    match rule:
        case None:
            yield Lost("no counterpart is known")
        case Move(key, None):
            yield write_override(key, value)
        case Move(key, values) if values is not None and _key(value) in values:
            yield write_override(key, values[_key(value)])
        case Pick(choices) if _key(value) in choices:
            yield from choices[_key(value)]
        case Pick(_, otherwise):
            yield Lost(otherwise)
        case Move(key):
            yield Lost(f"{key} has no such value")
        case OnlyIf(harmless, why) if value not in harmless:
            yield Lost(why)
        case Lost(why):
            if value not in OFF:
                yield Lost(why)


def _key(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _last_of_each(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides with the last value of each key; groups come first, because single keys override them."""
    last = {text.partition("=")[0]: text for text in overrides}
    return sorted(last.values(), key=lambda text: "." in text.partition("=")[0])
