"""Keeps string overrides exactly as typed.

Hydra reads values before any field is known, so `model.revision=1e5` would become `100000.0`. Overrides are quoted here
where their field is a text, and `1e3` becomes a whole number where the field is one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qlora.config.fields import KeyPath, _alternatives, split_key, type_at
from qlora.config.options import MANY
from qlora.config.paths import expand_home
from qlora.upstream.hydra import OverrideLexer, override_tokens

READ_EARLY = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
"""Tokens that Hydra reads as something else than text."""

CHOICE = re.compile(r"\A([^=]*=)\s*choice\s*\((.*)\)\s*\Z", re.DOTALL)

OPENING = (OverrideLexer.BRACKET_OPEN, OverrideLexer.BRACE_OPEN, OverrideLexer.POPEN)

CLOSING = (OverrideLexer.BRACKET_CLOSE, OverrideLexer.BRACE_CLOSE, OverrideLexer.PCLOSE)

NUMERIC = ("int", "float", "bool", "range", "interval")
"""Functions of Hydra's grammar whose arguments are numbers, whatever the field is."""

HOME = re.compile(r"~[\w./+@%:-]*")
"""A path below a home folder, which Hydra's grammar does not read."""

WHOLE = re.compile(r"[+-]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][+]?[0-9]+")
"""A number with an exponent, which may be whole."""

LARGEST_EXPONENT = 30
"""No field holds a larger whole number; the digits of 10^1000000 are never written out."""


def keep_spelling(overrides: Sequence[str]) -> list[str]:
    """Returns overrides that mean what they look like: `name=1e5` becomes `name='1e5'`, `trainer.max_steps=1e3` 1000.

    The values of sweeps, lists and mappings are included; an override that needs no change is returned unchanged.
    """
    return [_keep_one(text) for text in overrides]


def _keep_one(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or key.startswith("~"):
        return text
    if HOME.fullmatch(value):  # Hydra's own folders are not expanded later
        return f"{key}='{expand_home(value, key) if key.startswith('hydra.') else value}'"
    tokens = [token for token in override_tokens(text) if token.start > len(key)]
    name = key.lstrip("+").partition("@")[0]
    changed, end, holds_null = "", 0, False
    for token, level in _single_words(tokens, _Level(split_key("source" if name == "from" else name))):
        changed += text[end : token.start] + _spell(token.text, level)
        end = token.stop + 1
        holds_null |= token.type == OverrideLexer.NULL and level.function == "choice"
    changed += text[end:]
    # Hydra's functions take no null, and its lists of values do: `choice(null,1)` is `null,1`.
    return CHOICE.sub(r"\1\2", changed) if holds_null else changed


@dataclass
class _Level:
    """The position of a value: at the top of an override, or inside a list, a mapping or a function's arguments."""

    path: KeyPath
    kind: int | None = None
    """The token that opened it; None: the top."""
    function: str = ""
    key: str | None = None
    """In a mapping, the key of the next value."""
    is_named: bool = False
    """Whether the next value is a named argument, such as `reverse=true`."""

    @property
    def awaits_key(self) -> bool:
        return self.kind == OverrideLexer.BRACE_OPEN and self.key is None

    @property
    def value_path(self) -> KeyPath:
        """The key of the next value."""
        if self.kind == OverrideLexer.BRACKET_OPEN:
            return (*self.path, "[]")
        return (*self.path, self.key) if self.key is not None else self.path


def _single_words(tokens: Sequence[Any], top: _Level) -> Iterator[tuple[Any, _Level]]:
    """Yields the tokens that Hydra reads early and that are a whole value, each with its level.

    Several tokens side by side (`2024-01-02`) are a text for Hydra, which keeps their spelling.
    """
    levels, run = [top], list[Any]()
    for token in [*tokens, None]:
        level, kind = levels[-1], token.type if token is not None else None
        if kind == OverrideLexer.COLON and level.awaits_key:
            level.key, run = "".join(word.text for word in run), []
            continue
        if kind not in (None, OverrideLexer.COMMA, OverrideLexer.EQUAL, *OPENING, *CLOSING):
            run += [token] if kind != OverrideLexer.WS else []
            continue
        if len(run) == 1 and run[0].type in READ_EARLY and not (level.awaits_key or level.is_named):
            yield run[0], level
        if kind in OPENING:
            levels.append(_Level(level.value_path, kind, function=run[0].text if run else level.function))
        elif kind in CLOSING and len(levels) > 1:
            levels.pop()
        elif kind == OverrideLexer.COMMA:
            level.key = None
        level.is_named, run = kind == OverrideLexer.EQUAL, []


def _spell(word: str, level: _Level) -> str:
    if word.lower() == "null":
        return word
    hint = type_at(level.value_path)
    if (is_text(hint) or _is_choice(level)) and level.function not in NUMERIC:
        return f"'{word}'"
    number = whole_number(word) if is_whole(hint) else None
    return word if number is None else str(number)


def _is_choice(level: _Level) -> bool:
    """Returns whether a value is the name of an option of a group: ours have a dataclass, others are not known here."""
    if len(level.path) != 1 or level.value_path not in (level.path, (*level.path, "[]")):
        return False
    hint = type_at(level.path)
    return hint is None or dataclasses.is_dataclass(hint) or level.path[0] in MANY


def is_text(hint: Any) -> bool:
    """Returns whether a key holds words as they are spelled; one that holds whole numbers too does not."""
    return str in _alternatives(hint) and int not in _alternatives(hint)


def is_whole(hint: Any) -> bool:
    """Returns whether the numbers that a key holds are whole."""
    return int in _alternatives(hint) and float not in _alternatives(hint)


def whole_number(text: str) -> int | None:
    """Returns `1e3` or `1.5e3` as a whole number; None: it is not whole, or has no exponent."""
    if not WHOLE.fullmatch(text):
        return None
    number = Decimal(text.replace("_", ""))
    if abs(number.adjusted()) > LARGEST_EXPONENT or number != number.to_integral_value():
        return None
    return int(number)
