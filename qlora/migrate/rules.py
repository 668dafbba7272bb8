"""How a table says what becomes of another project's key, and the pass over a config that reads the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.config.overrides import write_override


@dataclass(frozen=True)
class Lost:
    """What cannot be said here: why, or what to do instead."""

    why: str
    key: str = ""
    """The other project's key, where it is not the one that the rule stands at."""


@dataclass(frozen=True)
class Move:
    """The value goes to a key of ours; `values` translates it, and one that is missing there is lost."""

    key: str
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Pick:
    """Each value has overrides of its own; one that is missing is lost with `otherwise`."""

    choices: Mapping[Any, tuple[str, ...]]
    otherwise: str = "there is no such choice here"


@dataclass(frozen=True)
class Same:
    """Needs no override: it has no counterpart that could differ."""

    why: str = ""


@dataclass(frozen=True)
class OnlyIf:
    """Needs nothing while it has one of these values, and is lost with `why` otherwise."""

    harmless: tuple[Any, ...]
    why: str


Rule = Move | Pick | Same | OnlyIf | Lost
Part = str | Lost

UNSET: tuple[Any, ...] = (None, "", [], {})
OFF = (*UNSET, False, 0, "none", "no")
"""Values with which an option is as good as left out."""


class Taken(dict[str, Any]):
    """The facts of a config; remembers which were read."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self.read: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a value and notes that it was read; `default` where it is unset."""
        self.read.add(key)
        value = self.get(key)
        return default if value in UNSET else value


Joint = Callable[[Taken], Iterator[Part]]
"""Reads several keys together, each with `take`."""


@dataclass(frozen=True)
class Dialect:
    """What is known of another project's configs."""

    name: str
    """How the project is called."""
    defaults: tuple[str, ...]
    """Its own defaults, as overrides, where they differ from ours; all that is written in a file comes later."""
    rules: Mapping[str, Rule]
    """By the full key: a key below another as `optimizer.lr`."""
    joints: tuple[Joint, ...]
    prefixes: Mapping[str, Rule] = field(default_factory=dict)
    """Rules for all keys that begin so."""


@dataclass
class Reading:
    """What became of a config."""

    overrides: list[str]
    lost: list[tuple[str, Any, str]]
    """Key, value and reason of what was not mapped."""


def translate(dialect: Dialect, facts: Mapping[str, Any]) -> Reading:
    """Returns the overrides for a config, and what of it was lost."""
    taken = Taken(facts)
    reading = Reading(list(dialect.defaults), [])
    for joint in dialect.joints:
        for part in joint(taken):
            _note(reading, part, "", taken)
    for key, value in facts.items():
        if key in taken.read:
            continue
        rule = dialect.rules.get(key) or next(
            (each for prefix, each in dialect.prefixes.items() if key.startswith(prefix)), None
        )
        if value in UNSET and not isinstance(value, bool):
            continue
        for part in _apply(rule, value):
            _note(reading, part, key, taken)
    reading.overrides = _last_of_each(reading.overrides)
    return reading


def _note(reading: Reading, part: Part, key: str, facts: Taken) -> None:
    if isinstance(part, str):
        reading.overrides.append(part)
    else:
        own = part.key or key
        reading.lost.append((own, facts.get(own), part.why))


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
    """Returns the overrides with the last value of each key, groups first: their options lose to single keys."""
    last = {text.partition("=")[0]: text for text in overrides}
    return sorted(last.values(), key=lambda text: "." in text.partition("=")[0])
